"""Idle I/O priority: reading a disk must not slow the guests that are served from the same storage.

ioprio_set(2), class idle: such a request waits until nobody else wants the device. Which schedulers listen
(/sys/block/DEVICE/queue/scheduler): bfq, and mq-deadline from Linux 5.14 on, which lets it wait ten seconds at most
(prio_aging_expire); kyber and none do not, and so most NVMe drives do not. There only a read limit helps. The priority
is a thread's, and processes it starts inherit it.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# The numbers of (ioprio_set, ioprio_get); the C library has no wrapper. linux: arch/*/entry/syscalls, asm-generic.
_NUMBERS = {
    "x86_64": (251, 252),
    "i686": (289, 290),
    "aarch64": (30, 31),
    "riscv64": (30, 31),
    "loongarch64": (30, 31),
    "ppc64le": (273, 274),
    "s390x": (282, 283),
    "armv7l": (314, 315),
}
_WHO_PROCESS = 1  # IOPRIO_WHO_PROCESS: in truth one thread
_CLASS_SHIFT = 13
CLASS_IDLE = 3

# Neither call waits for anything: see agent/disk/residency.py on keeping the GIL.
_quick = ctypes.PyDLL(None, use_errno=True)
_quick.syscall.restype = ctypes.c_long
_numbers = _NUMBERS.get(platform.machine())


def priority_class(thread: int = 0) -> int | None:
    """The I/O class of a thread: 0 none set, 1 real time, 2 best effort, 3 idle; None where it cannot be asked.

    Args:
        thread: its kernel id, or the process id of a process's first thread; 0 is the calling thread.
    """
    value = _get(thread)
    return None if value is None else value >> _CLASS_SHIFT


@contextmanager
def idle_priority() -> Iterator[None]:
    """Give the calling thread idle I/O priority, and its own back afterwards.

    It is advice: where it cannot be given (unknown architecture, a container that forbids the call), nothing changes.
    """
    before = _get(0)
    changed = before is not None and _set(CLASS_IDLE << _CLASS_SHIFT)
    try:
        yield
    finally:
        if changed and before is not None and not _set(before):
            # A kernel may tell the priority that follows from the nice value and refuse to have it set: clear it.
            _set(0)


def _get(thread: int) -> int | None:
    if _numbers is None:
        return None
    value = _quick.syscall(ctypes.c_long(_numbers[1]), ctypes.c_long(_WHO_PROCESS), ctypes.c_long(thread))
    return None if value < 0 else int(value)


def _set(value: int) -> bool:
    assert _numbers is not None
    done = _quick.syscall(
        ctypes.c_long(_numbers[0]), ctypes.c_long(_WHO_PROCESS), ctypes.c_long(0), ctypes.c_long(value)
    )
    return bool(done == 0)
