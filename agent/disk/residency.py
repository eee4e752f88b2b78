"""Which pages of a file or block device are in the page cache, asked without touching them.

cachestat(2) (Linux 6.5) counts the pages of a range in about a microsecond. mincore(2) over a short mapping names each
page, for about a third of what it costs to read it from the cache; so an older kernel is asked by sample first.
(preadv2 with RWF_NOWAIT is no way to ask: it does start reading what is not there.)

Both tell the truth only about files that we own or may write (Linux 5.2 on; root may always ask): about others mincore
says "all resident" and cachestat refuses. Then the file is read as if it were cached: nothing gained, nothing broken.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

PAGE_BYTES = mmap.PAGESIZE

# Without cachestat, a longer range than this is taken for cached when one page in so many is.
_SAMPLE_BYTES = 128 * PAGE_BYTES
_MAPPED_BYTES = 64 * 1024 * 1024  # one mapping at a time: a vector of 16 KiB
# Numbers of new system calls are the same on all architectures but alpha.
_CACHESTAT = None if platform.machine() == "alpha" else 451

# cachestat walks the page cache under RCU and never waits for storage: keeping the GIL for its microsecond is cheaper
# than giving it away and waiting to get it back. mincore may wait for the address space's lock.
_quick = ctypes.PyDLL(None, use_errno=True)
_quick.syscall.restype = ctypes.c_long
_quick.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_MAP_FAILED = ctypes.c_void_p(-1).value

_CachestatRange = ctypes.c_uint64 * 2  # offset, length
_CachestatAnswer = ctypes.c_uint64 * 5  # cached, dirty, writeback, evicted, recently evicted pages

Run = tuple[int, int]
"""First byte and the byte behind the last."""


class Residency:
    """What the page cache holds of the file or device open (for reading) at a descriptor. Thread-safe.

    Args:
        fd: stays the caller's, and open as long as questions are asked.
        with_cachestat: False asks mincore for everything, as an older kernel makes us do.
    """

    def __init__(self, fd: int, *, with_cachestat: bool = True) -> None:
        self._fd = fd
        self._count = with_cachestat and _CACHESTAT is not None

    def missing(self, start: int, end: int) -> list[Run]:
        """The runs of whole pages between `start` and `end` that are not in the cache, in order, not adjoining.

        The range is widened to whole pages, so the first run may begin before `start`, the last end behind `end`.
        Without cachestat, gaps in a long range that is mostly cached may go unnoticed.

        Raises:
            OSError: the kernel does not tell.
        """
        first = start - start % PAGE_BYTES
        behind = -(-end // PAGE_BYTES) * PAGE_BYTES
        if first >= behind:
            return []
        if self._count:
            counted = self._cached_pages(first, behind - first)
            if counted is not None and counted >= (behind - first) // PAGE_BYTES:
                return []
            if counted == 0:
                return [(first, behind)]
        if not self._count and behind - first > _SAMPLE_BYTES and self._sampled(first, behind):
            return []
        return self.named(first, behind)

    def _cached_pages(self, offset_bytes: int, length_bytes: int) -> int | None:
        """How many pages of the range are cached; None (and never asked again) where cachestat does not tell."""
        asked = _CachestatRange(offset_bytes, length_bytes)
        answer = _CachestatAnswer()
        assert _CACHESTAT is not None
        done = _quick.syscall(
            ctypes.c_long(_CACHESTAT), ctypes.c_long(self._fd), ctypes.byref(asked), ctypes.byref(answer), 0
        )
        if done != 0:
            self._count = False
            return None
        return int(answer[0])

    def _sampled(self, first: int, behind: int) -> bool:
        """Whether all of a few pages of the range are cached."""
        present = ctypes.c_ubyte()
        with self._mapping(first, behind - first) as address:
            for at in (*range(0, behind - first, _SAMPLE_BYTES), behind - first - PAGE_BYTES):
                if _quick.mincore(address + at, PAGE_BYTES, ctypes.byref(present)) != 0:
                    raise _last_error()
                if not present.value & 1:
                    return False
        return True

    def named(self, first: int, behind: int) -> list[Run]:
        """`missing`, page by page, for a range of whole pages."""
        missing: list[Run] = []
        for start in range(first, behind, _MAPPED_BYTES):
            for run in self._named_in_mapping(start, min(_MAPPED_BYTES, behind - start)):
                if missing and missing[-1][1] == run[0]:
                    missing[-1] = (missing[-1][0], run[1])
                else:
                    missing.append(run)
        return missing

    def _named_in_mapping(self, offset_bytes: int, length_bytes: int) -> list[Run]:
        vector = np.empty(length_bytes // PAGE_BYTES, dtype=np.uint8)
        with self._mapping(offset_bytes, length_bytes) as address:
            if _libc.mincore(address, length_bytes, vector.ctypes.data) != 0:
                raise _last_error()
        return _runs_of(vector & 1 == 0, offset_bytes)

    @contextmanager
    def _mapping(self, offset_bytes: int, length_bytes: int) -> Iterator[int]:
        address = _libc.mmap(None, length_bytes, mmap.PROT_READ, mmap.MAP_SHARED, self._fd, offset_bytes)
        if address == _MAP_FAILED:
            raise _last_error()
        try:
            yield address
        finally:
            _libc.munmap(address, length_bytes)


def _runs_of(absent: np.ndarray[tuple[int], np.dtype[np.bool_]], offset_bytes: int) -> list[Run]:
    """Runs of True as byte ranges; one element is one page, the first page begins at `offset_bytes`."""
    edges = np.flatnonzero(absent[1:] != absent[:-1]) + 1
    at = (edges * PAGE_BYTES + offset_bytes).tolist()
    if absent[0]:
        at.insert(0, offset_bytes)
    if absent[-1]:
        at.append(offset_bytes + len(absent) * PAGE_BYTES)
    return list(zip(at[::2], at[1::2], strict=True))


def _last_error() -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number))
