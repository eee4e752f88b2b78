"""fallocate(2) with its modes, which Python's `os` does not offer, and the ioctls that measure a block device."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fs.h
_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    """fallocate(2); raises `OSError`. Other Python threads run meanwhile."""
    if _libc.fallocate(fd, mode, offset_bytes, length_bytes) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def block_device_size_bytes(fd: int) -> int:
    """Size of the block device open at `fd`, in bytes."""
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("Q", answer)[0])


def logical_sector_bytes(fd: int) -> int:
    """The smallest unit the block device open at `fd` addresses, in bytes."""
    answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
    return int(struct.unpack("i", answer)[0])
