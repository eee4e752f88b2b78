"""A pass's digest map: what it knows, what the pass learns, what it is about to overwrite.

Nothing that goes wrong with the map's file is an error of the pass: the map is then given up, and knows nothing more.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import structlog
from numpy.typing import NDArray

from agent.delta.blocks import BLOCK_BYTES, Ranges
from agent.delta.digest_map import WINDOW_BLOCKS, WINDOW_BYTES, Entries, Known, Window, whole_blocks
from agent.delta.digests import DIGEST_BYTES
from agent.disk.stamp import Stamp
from agent.sync.map_file import GROUP_WINDOWS, MapFile

log = structlog.get_logger("failback.agent")

CACHED_WINDOWS = 64
"""Windows in memory at once: 1 MiB of digests, and more than the readers of a pass work on."""

Run = tuple[int, int]


class PassMap:
    """The map of one disk in one pass. May be used from several threads.

    Blocks may be looked up and entered before anything of them is written, and entered again when what was written is
    proven; in between nothing counts.

    Args:
        file: open for writing; owned from now on.

    Attributes:
        seed: of its digests; `shape`: how the disk falls into windows.
        lost: why the map was given up, a clause; empty as long as it is there.
    """

    def __init__(self, file: MapFile) -> None:
        self._file = file
        self.shape = file.header.shape
        self._turn = threading.Lock()
        self._marking = threading.Lock()
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._unproven: dict[int, Ranges] = {}  # written, or about to be, by the first byte; each byte once in a pass
        self._marked: set[int] = set()
        self.seed = file.header.seed
        self.lost = ""

    @property
    def image(self) -> str:
        """The path of the image it is about."""
        return self._file.header.image

    # --- asking ---------------------------------------------------------------------------------------------------

    def look_up(self, runs: Iterable[Run]) -> tuple[Entries, Known]:
        """What the blocks of the runs hold (shape (n, 16)), and which of that is known (shape (n,)).

        Args:
            runs: offsets and lengths in bytes, from block boundaries on.
        """
        entries: list[Entries] = []
        known: list[Known] = []
        for number, first, end in _parts(runs):
            entries.append(np.zeros((end - first, DIGEST_BYTES), dtype=np.uint8))
            known.append(np.zeros(end - first, dtype=bool))
            with self._held():
                self._require()
                window = self._window(number)
                entries[-1][:], known[-1][:] = window.entries[first:end], window.known[first:end]
        return np.concatenate(entries), np.concatenate(known)

    def knows_something(self, runs: Iterable[Run]) -> bool:
        """Whether asking about the blocks of the runs is worth it."""
        return not self.lost and bool(self.look_up(runs)[1].any())

    # --- learning -------------------------------------------------------------------------------------------------

    def enter(self, runs: Iterable[Run], digests: Sequence[bytes]) -> None:
        """The blocks of the runs, from block boundaries on, were read and have these digests."""
        rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        at = 0
        for number, first, end in _parts(runs):
            with self._held():
                self._require()
                self._window(number).enter(first, rows[at : at + end - first])
            at += end - first

    def enter_zeroes(self, runs: Iterable[Run]) -> None:
        """The runs read as zero: whatever blocks lie in them whole are known."""
        for offset, length in runs:
            first, behind = whole_blocks(self.shape, offset, length)
            if first < behind:
                with self._held():
                    self._require()
                    self._enter_zero_blocks(first, behind)

    def _enter_zero_blocks(self, first: int, behind: int) -> None:
        start = -(-first // WINDOW_BLOCKS)
        stop = self.shape.windows if behind == self.shape.blocks else behind // WINDOW_BLOCKS
        if start < stop:
            for number in [number for number in self._windows if start <= number < stop]:
                del self._windows[number]
            self._file.write_zero_windows(start, stop)
            edges = [(first, start * WINDOW_BLOCKS), (stop * WINDOW_BLOCKS, behind)]
        else:
            edges = [(first, behind)]
        for begin, end in edges:
            while begin < end:
                number, at = divmod(begin, WINDOW_BLOCKS)
                count = min(end - begin, WINDOW_BLOCKS - at)
                self._window(number).enter(at, self.shape.zero_entries(begin, count))
                begin += count

    # --- writing --------------------------------------------------------------------------------------------------

    def about_to_write(self, ranges: Ranges) -> None:
        """Call before rising ranges are written, none of them twice in a pass; when it returns it is durable that
        nothing is known of them."""
        inside = ranges[ranges[:, 0] < self.shape.size_bytes]
        if self.lost or not len(inside):
            return
        with self._turn:
            self._unproven[int(ranges[0, 0])] = inside
        last = np.minimum(inside[:, 0] + inside[:, 1], np.uint64(self.shape.size_bytes)) - np.uint64(1)
        group_bytes = np.uint64(WINDOW_BYTES * GROUP_WINDOWS)
        groups: set[int] = set()
        for first, end in {*zip((inside[:, 0] // group_bytes).tolist(), (last // group_bytes).tolist(), strict=True)}:
            groups.update(range(first, end + 1))
        if groups <= self._marked:
            return
        failure: OSError | None = None
        with self._marking:  # beside the readers, who need not wait for an fsync
            if not self.lost:
                try:
                    self._file.mark(sorted(groups))
                    self._marked |= groups
                except OSError as error:
                    failure = error
        if failure is not None:
            with self._turn:
                self._failed(failure)

    def proven(self, written: Iterable[int], blocks: NDArray[np.int64], digests: Sequence[bytes]) -> None:
        """Writes were flushed, read back and found right.

        Args:
            written: the first byte of the ranges of each `about_to_write` that this is about.
            blocks: blocks that were read back whole meanwhile, in any order, shape (n,); `digests`: theirs. Those that
                other writes touch are left out.
        """
        with self._held():
            self._require()
            for first in written:
                self._unproven.pop(first, None)
            rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
            good = ~self._is_unproven(blocks)
            blocks, rows = blocks[good], rows[good]
            order = np.argsort(blocks, kind="stable")
            blocks, rows = blocks[order], rows[order]
            numbers = blocks // WINDOW_BLOCKS
            cuts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
            for start, end in pairwise(cuts if len(numbers) else []):
                window, places = self._window(int(numbers[start])), blocks[start:end] % WINDOW_BLOCKS
                window.entries[places] = rows[start:end]
                window.known[places] = True
                window.changed = True

    def _is_unproven(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the blocks writes touch that are not proven, shape (n,)."""
        if not self._unproven or not len(blocks):
            return np.zeros(len(blocks), dtype=bool)
        ranges = np.concatenate([*self._unproven.values()]).astype(np.int64)
        ranges = ranges[np.argsort(ranges[:, 0])]
        first, last = ranges[:, 0] // BLOCK_BYTES, (ranges[:, 0] + ranges[:, 1] - 1) // BLOCK_BYTES
        at = np.searchsorted(first, blocks, side="right") - 1
        return np.asarray((at >= 0) & (last[np.maximum(at, 0)] >= blocks))

    # --- the end --------------------------------------------------------------------------------------------------

    def settle(self, view: str | None, stamp: Stamp | None) -> bool:
        """The pass is over and the disk closed; the map is put away, durably. False where it was given up.

        Args:
            view: that the disk equals now; None: the pass was not completed, and what was written and not proven is
                unknown.
            stamp: of the closed image, None for a block device.
        """
        with self._held():
            self._require()
            self._forget_unproven()
            self._store()
            self._windows.clear()
            self._file.settle(view or self._file.header.view, stamp)
            self._file.close()
        return not self.lost

    def break_off(self) -> None:
        """The pass begins anew with its writes: what was written and not proven is unknown."""
        with self._held():
            self._require()
            self._forget_unproven()

    def _forget_unproven(self) -> None:
        for ranges in self._unproven.values():
            self._forget(ranges)
        self._unproven.clear()

    def _forget(self, ranges: Ranges) -> None:
        for offset, length in ranges.tolist():
            first, end = offset // BLOCK_BYTES, min(-(-(offset + length) // BLOCK_BYTES), self.shape.blocks)
            for number, begin, behind in _parts([(first * BLOCK_BYTES, (end - first) * BLOCK_BYTES)]):
                self._window(number).forget(begin, behind)

    def close(self) -> None:
        """Let go of a map that was only looked up."""
        with self._held():
            self._require()
            self._windows.clear()
            self._file.close()

    @property
    def known_bytes(self) -> int:
        """How much of the disk is known; what is about to be overwritten counts until the end."""
        known: list[int] = []
        with self._held():
            self._require()
            self._store()
            known.append(self._file.stored_bytes)
        return sum(known)

    def _store(self) -> None:
        for number, window in self._windows.items():
            if window.changed:
                self._file.write_window(number, window)

    def give_up(self, why: str) -> None:
        """The map is not to be trusted, or cannot be kept: it is removed. `why`: a clause."""
        with self._turn:
            self._give_up(why)

    # --- windows --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """One thread at a time. What follows `_require` is left out when the map was given up, and ends where it is."""
        with self._turn, contextlib.suppress(_GivenUp):
            try:
                yield
            except OSError as error:
                self._failed(error)

    def _require(self) -> None:
        if self.lost:
            raise _GivenUp

    def _failed(self, error: OSError) -> None:
        room = "; free some room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        self._give_up(f"its file {self._file.path} failed: {error.strerror or error}{room}")

    def _give_up(self, why: str) -> None:
        if self.lost:
            return
        log.warning("a digest map is given up", map=str(self._file.path), reason=why)
        self._windows.clear()
        self._unproven.clear()
        with self._marking:  # nobody may be at the file when its descriptor is closed
            self.lost = why
            # What cannot be removed is not trusted all the same: it stands for no view, and its image has changed.
            with contextlib.suppress(OSError):
                self._file.remove()

    def _window(self, number: int) -> Window:
        """A window, in memory; the one that was not asked for longest is stored and leaves."""
        window = self._windows.get(number)
        if window is None:
            window = self._windows[number] = self._file.read_window(number)
            if len(self._windows) > CACHED_WINDOWS:
                former, left = self._windows.popitem(last=False)
                if left.changed:
                    self._file.write_window(former, left)
        else:
            self._windows.move_to_end(number)
        return window


class _GivenUp(Exception):
    """Whatever was about to be done with the map: it is gone."""


def _parts(runs: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """The blocks of runs that begin at block boundaries, by window: its number, the first in it, behind the last."""
    for offset, length in runs:
        block, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
        while block < end:
            number, first = divmod(block, WINDOW_BLOCKS)
            count = min(end - block, WINDOW_BLOCKS - first)
            yield number, first, first + count
            block += count
