"""Reading past the page cache: to hear from the storage and not from memory, and to leave memory to others.

open(2): O_DIRECT wants offset, length and memory aligned to the logical sector of the storage; 4096 serves every
file system and device we know of, a larger sector of a block device is respected. What is aligned is read straight
into the caller's memory. The rest is widened to that alignment and read into page-aligned memory of our own; the wanted
bytes are copied out.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import stat
from pathlib import Path

_ALIGN_BYTES = 4096
_CHUNK_BYTES = 4 * 1024 * 1024


class DirectReader:
    """A second, O_DIRECT descriptor of a disk that is already open. May be used from several threads.

    Args:
        fd: a descriptor opened with O_DIRECT; the reader owns it.
        size_bytes: where the disk ends.
        align_bytes: a power of two.
    """

    def __init__(self, fd: int, size_bytes: int, align_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._align_bytes = align_bytes
        self._idle: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()

    @classmethod
    def of(cls, fd: int, size_bytes: int, sector_bytes: int) -> DirectReader | None:
        """A reader of the very file or device behind `fd`, or None where O_DIRECT does not work on it."""
        align_bytes = max(_ALIGN_BYTES, sector_bytes)
        try:
            # Through /proc, not by path: a path may have been given to another file meanwhile.
            direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        reader = cls(direct_fd, size_bytes, align_bytes)
        try:
            reader.read_into(0, memoryview(bytearray(min(size_bytes, align_bytes))))
        except OSError:
            reader.close()
            return None
        return reader

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset_bytes` on; raises `OSError`, also when the storage is shorter than its size."""
        done = self._read_aligned(offset_bytes, buffer)
        if done == buffer.nbytes:
            return
        try:
            memory = self._idle.get_nowait()
        except queue.Empty:
            memory = mmap.mmap(-1, _CHUNK_BYTES)
        try:
            while done < buffer.nbytes:
                done += self._read_chunk(offset_bytes + done, buffer[done:], memory)
        finally:
            self._idle.put(memory)

    def _read_aligned(self, offset_bytes: int, buffer: memoryview) -> int:
        """Read what can go straight into `buffer`, from its beginning on; returns how much that was."""
        straight = buffer.nbytes - buffer.nbytes % self._align_bytes
        if straight == 0 or offset_bytes % self._align_bytes or _address(buffer) % self._align_bytes:
            return 0
        done = 0
        while done < straight and done % self._align_bytes == 0:
            got = os.preadv(self._fd, [buffer[done:straight]], offset_bytes + done)
            if got == 0:
                raise _shrunk(offset_bytes + done)
            done += got
        return done

    def _read_chunk(self, offset_bytes: int, buffer: memoryview, memory: mmap.mmap) -> int:
        """Read as much of `buffer` as one aligned request yields; returns how much."""
        align = self._align_bytes
        first = offset_bytes - offset_bytes % align
        end = min(offset_bytes + len(buffer), self._size_bytes)
        wanted = min(_CHUNK_BYTES, (end - first + align - 1) // align * align)
        with memoryview(memory) as whole, whole[:wanted] as part:
            # The last request may reach behind the end: the kernel shortens it there (files and devices alike).
            got = os.preadv(self._fd, [part], first)
            useful = min(first + got, end) - offset_bytes
            if useful <= 0:
                raise _shrunk(offset_bytes)
            buffer[:useful] = part[offset_bytes - first : offset_bytes - first + useful]
        return useful

    def close(self) -> None:
        """Close the descriptor and give the memory back. Nobody may be reading."""
        os.close(self._fd)
        while not self._idle.empty():
            self._idle.get_nowait().close()


def _shrunk(offset_bytes: int) -> OSError:
    return OSError(0, f"the storage ends before byte {offset_bytes}: it was made smaller meanwhile")


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def direct_works(path: Path) -> bool:
    """Whether the file or block device at `path` can be read past the page cache; raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        is_device = stat.S_ISBLK(status.st_mode)
        reader = DirectReader.of(fd, _ALIGN_BYTES if is_device else min(status.st_size, _ALIGN_BYTES), _ALIGN_BYTES)
        if reader is not None:
            reader.close()
        return reader is not None
    finally:
        os.close(fd)
