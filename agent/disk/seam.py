"""The one seam between the data plane and storage.

Everything above it (hashing, sending, writing, reading back) knows only `Disk`. It is synchronous and is
called from worker threads; a `Disk` may be used from several threads at once. The conformance suite in
``tests/contract/test_disk.py`` is passed by every backend, the in-memory one of the tests included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of one kind.

    Attributes:
        offset_bytes: first byte.
        length_bytes: length, at least 1.
        zero: True only where the storage guarantees that the run reads as zero
            (NBD ``NBD_STATE_ZERO``, ``SEEK_HOLE`` of a raw file). A hole that is not zero is data.
    """

    offset_bytes: int
    length_bytes: int
    zero: bool


class Disk(Protocol):
    """A disk of a known, fixed size.

    All methods raise `agent.errors.DiskError` (with facts ``disk``, ``offset_bytes``, ``length_bytes`` where
    they apply) and nothing else. Requests outside ``[0, size_bytes)`` are an error, never shortened.
    """

    @property
    def name(self) -> str:
        """What messages call this disk, for example ``vda``."""

    @property
    def size_bytes(self) -> int:
        """Size as the guest sees it, in bytes; need not be a multiple of anything."""

    @property
    def access(self) -> str:
        """How the content is reached, for reports: ``file``, ``cluster map``, ``NBD (the image is dirty)`` …"""

    @property
    def readers(self) -> int:
        """How many threads should read at once to get this storage's speed; more bring nothing."""

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` (contiguous, writable bytes) from `offset_bytes` on."""

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Write all of `data`; not durable before `flush`."""

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of many runs, end to end; they are under way together where that is faster.

        Args:
            runs: offset and length of each, in bytes; rising, not overlapping. The batch is validated whole before
                the first byte moves. After an error that came later `buffer` holds anything.
            buffer: contiguous, writable, exactly as long as the runs together.

        A failed run is named by the facts of the error.
        """

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        """Write `data`, the bytes of many runs end to end: like `read_runs`, and not durable before `flush`.

        After an error any of the runs may have been written.
        """

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the run read as zero, releasing its storage where the storage can; not durable before `flush`."""

    def flush(self) -> None:
        """Make everything written durable (fdatasync, NBD_CMD_FLUSH).

        A failed flush poisons the disk: every later write and flush raises too, for the kernel may have
        marked pages clean that never reached the storage; the only way on is to open the disk anew.
        """

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        """The extents of the run: in order, adjoining, together exactly the run asked for."""

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        """Like `read_into`, but past the page cache, so that it tells what the storage holds."""

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Like `read_runs`, but past the page cache, as `read_back`."""

    @property
    def reads_back_past_cache(self) -> bool:
        """False where the storage has no way past the page cache (tmpfs of old kernels); reports say so."""

    def close(self) -> None:
        """Release everything; harmless when repeated. Unflushed writes may be lost."""
