"""What the file system says of a file: whether anybody wrote to it since it was looked at."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What the file system says of a file. Unchanged, nobody wrote to the file meanwhile.

    Attributes:
        device, inode: which file.
        size_bytes: its size.
        mtime_ns, ctime_ns: when its content and its inode changed last.
        boot: of the host (random(4), ``boot_id``). After another boot the rest proves nothing: fdatasync(2) makes data
            durable without the times, so that a host that died may have kept a write and lost the trace of it.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    boot: str

    def changed_to(self, now: Stamp) -> tuple[str, ...]:
        """Names of what is another in `now`; empty where nobody wrote to the file meanwhile.

        All of it counts, also while the image lock was held: locks bind QEMU alone, and whoever writes past them can
        set every time back but `ctime_ns` (utimensat(2)). A change of the owner alone looks like a write, then; that
        costs a comparison.
        """
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(now, f.name))

    def content_changed_to(self, now: Stamp) -> bool:
        """Whether it is another file in `now`, or one whose content was changed for all to see: more than its inode.

        Another boot of the host alone is no sign of that.
        """
        return not {"ctime_ns", "boot"}.issuperset(self.changed_to(now))


def stamp_of(fd: int) -> Stamp | None:
    """The stamp of an open file; None where it would prove nothing: a block device, a file system that keeps whole
    seconds, a host that does not name its boots.

    Raises:
        OSError: the file cannot be asked.
    """
    status = os.fstat(fd)
    whole_seconds = status.st_mtime_ns % _SECOND_NS == 0 and status.st_ctime_ns % _SECOND_NS == 0
    if not stat.S_ISREG(status.st_mode) or whole_seconds:
        return None
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return Stamp(
        device=status.st_dev,
        inode=status.st_ino,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        boot=boot,
    )
