"""A disk whose page cache is not to be believed: after a failed flush clean pages may hold what storage does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agent.disk.seam import Disk, Extent


class PastCache:
    """`disk`, every read of which goes past the page cache, and of which nothing is known to be zero."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    @property
    def name(self) -> str:
        """As `Disk.name`; so are all that follow what their namesakes there are."""
        return self._disk.name

    @property
    def size_bytes(self) -> int:
        return self._disk.size_bytes

    @property
    def readers(self) -> int:
        return self._disk.readers

    @property
    def access(self) -> str:
        return f"{self._disk.access}, past the page cache"

    @property
    def reads_back_past_cache(self) -> bool:
        return self._disk.reads_back_past_cache

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        self._disk.read_back(offset_bytes, buffer)

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        self._disk.read_back_runs(runs, buffer)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        self._disk.write(offset_bytes, data)

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        self._disk.write_runs(runs, data)

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._disk.write_zeroes(offset_bytes, length_bytes)

    def flush(self) -> None:
        self._disk.flush()

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        if length_bytes:
            yield Extent(offset_bytes, length_bytes, zero=False)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        self._disk.read_back(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        self._disk.read_back_runs(runs, buffer)

    def close(self) -> None:
        self._disk.close()
