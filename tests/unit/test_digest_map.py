"""The digest map on disk: what is stored is found again, and what a crash or damage makes doubtful is unknown."""

from __future__ import annotations

import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.delta.blocks import BLOCK_BYTES
from agent.delta.digest_map import (
    ENTRIES_BYTES,
    RECORD_BYTES,
    WINDOW_BLOCKS,
    WINDOW_BYTES,
    Kind,
    Shape,
    Window,
    decoded,
    encoded,
    kind_of,
    known_blocks,
    whole_blocks,
)
from agent.delta.digests import block_digests
from agent.sync.map_file import GROUP_WINDOWS, HEADER_BYTES, Header, MapFile, NoMap, Stamp, map_bytes

SEED = 11
SIZE = 3 * WINDOW_BYTES + 5 * BLOCK_BYTES + 512
SHAPE = Shape(SIZE, SEED)
GROUP_BYTES = GROUP_WINDOWS * WINDOW_BYTES
HEADER = Header(seed=SEED, size_bytes=SIZE, image="/images/vda.raw")
STAMP = Stamp(inode=1, size_bytes=SIZE, mtime_ns=5, ctime_ns=7)


def noise_window(count: int = WINDOW_BLOCKS, *, known: int | None = None) -> Window:
    """A window that knows its first `known` blocks."""
    window = Window.unknown(count)
    some = count if known is None else known
    rows = np.frombuffer(random.Random(count).randbytes(some * 16), dtype=np.uint8).reshape(some, 16)
    window.enter(0, rows)
    return window


# --- windows ----------------------------------------------------------------------------------------------------------


def test_a_window_is_found_again_as_it_was_stored() -> None:
    window = noise_window(known=1000)
    found = decoded(*encoded(window, 1, SHAPE), 1, SHAPE)
    assert found is not None
    assert found.known.tolist() == window.known.tolist()
    assert found.entries[:1000].tobytes() == window.entries[:1000].tobytes()


def test_a_window_of_zeroes_is_its_record_alone_also_where_the_disk_ends_within_a_block() -> None:
    for number in (0, 3):
        count = SHAPE.blocks_of(number)
        zeroes = Window(SHAPE.zero_entries(number * WINDOW_BLOCKS, count), np.ones(count, dtype=bool))
        record, entries = encoded(zeroes, number, SHAPE)
        assert (kind_of(record), entries) == (Kind.ZERO, b"")
        found = decoded(record, b"", number, SHAPE)
        assert found is not None
        assert found.entries.tobytes() == zeroes.entries.tobytes()
        assert found.known.all()
    assert SHAPE.zero_entries(3 * WINDOW_BLOCKS, 6)[-1].tobytes() == block_digests(memoryview(bytes(512)), seed=SEED)[0]


@pytest.mark.parametrize("at", [0, 8, 20, RECORD_BYTES + 100, RECORD_BYTES + ENTRIES_BYTES - 1])
def test_one_flipped_bit_anywhere_makes_a_window_unusable(at: int) -> None:
    record, entries = encoded(noise_window(), 0, SHAPE)
    both = bytearray(record + entries)
    both[at] ^= 4
    assert decoded(bytes(both[:RECORD_BYTES]), bytes(both[RECORD_BYTES:]), 0, SHAPE) is None


def test_known_blocks_are_counted_from_the_records_alone() -> None:
    windows = [noise_window(known=17), Window.unknown(WINDOW_BLOCKS), noise_window(), noise_window(6)]
    windows[3] = Window(SHAPE.zero_entries(3 * WINDOW_BLOCKS, 6), np.ones(6, dtype=bool))
    records = b"".join(encoded(window, number, SHAPE)[0] for number, window in enumerate(windows))
    assert known_blocks(records, 0, SHAPE).tolist() == [17, 0, WINDOW_BLOCKS, 6]


@pytest.mark.parametrize(
    ("run", "blocks"),
    [
        ((0, BLOCK_BYTES), (0, 1)),
        ((1, BLOCK_BYTES), (1, 1)),
        ((1, 2 * BLOCK_BYTES), (1, 2)),
        ((SIZE - 512, 512), (SHAPE.blocks - 1, SHAPE.blocks)),
        ((SIZE - 512, 100_000), (SHAPE.blocks - 1, SHAPE.blocks)),  # a larger target's tail
    ],
)
def test_whole_blocks_of_a_run(run: tuple[int, int], blocks: tuple[int, int]) -> None:
    assert whole_blocks(SHAPE, *run) == blocks


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_map_is_private_sparse_and_needs_a_quarter_of_a_gib_for_each_tib(tmp_path: Path) -> None:
    path = tmp_path / "maps" / "a.map"
    made = MapFile.create(path, replace(HEADER, size_bytes=1 << 40))
    made.close()
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert 256 << 20 <= status.st_size == map_bytes(1 << 40) <= 261 << 20
    assert status.st_blocks * 512 <= 64 << 10


def test_windows_header_and_view_survive_a_settled_close(tmp_path: Path) -> None:
    path = tmp_path / "a.map"
    made = MapFile.create(path, HEADER)
    made.mark([0])
    made.write_window(1, noise_window())
    made.write_zero_windows(2, 4)
    assert made.stored_bytes == 2 * WINDOW_BYTES + 6 * BLOCK_BYTES
    assert made.known_bytes == 0
    made.settle("r1-3", STAMP)
    made.close()
    found = MapFile.open(path, writable=False)
    assert found.header == replace(HEADER, view="r1-3", stamp=STAMP)
    assert found.read_window(1).entries.tobytes() == noise_window().entries.tobytes()
    assert found.read_window(3).known.tolist() == [True] * 6
    assert not found.read_window(0).known.any()
    assert found.known_bytes == 2 * WINDOW_BYTES + 6 * BLOCK_BYTES
    found.close()


def test_a_crash_costs_the_groups_that_were_marked_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.map"
    size = 2 * GROUP_BYTES + WINDOW_BYTES
    made = MapFile.create(path, replace(HEADER, size_bytes=size))
    made.write_zero_windows(0, 2 * GROUP_WINDOWS + 1)
    made.settle("r1-1", STAMP)
    assert made.known_bytes == size
    made.mark([1])
    made.write_window(GROUP_WINDOWS, noise_window())
    made.close()  # as a killed process closes it
    looked = MapFile.open(path, writable=False)
    assert looked.known_bytes == size - GROUP_BYTES
    assert looked.header.view is None
    looked.close()
    found = MapFile.open(path, writable=True)
    assert found.known_bytes == found.stored_bytes == size - GROUP_BYTES
    assert not found.read_window(GROUP_WINDOWS).known.any()
    found.settle(None, STAMP)
    found.close()
    again = MapFile.open(path, writable=True)
    assert again.known_bytes == size - GROUP_BYTES  # what was forgotten does not come back
    again.close()


def test_a_mark_is_synced_once_however_often_the_group_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    made = MapFile.create(tmp_path / "a.map", replace(HEADER, size_bytes=8 * GROUP_BYTES))
    made.mark([0, 1, 2])
    made.mark([2, 1])
    made.mark([0])
    assert len(synced) == 1
    made.close()


def test_a_damaged_window_is_unknown_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.map"
    made = MapFile.create(path, HEADER)
    made.write_window(0, noise_window())
    made.write_window(1, noise_window())
    made.settle("v", STAMP)
    made.close()
    with path.open("r+b") as file:
        file.seek(made._layout.entries + ENTRIES_BYTES + 99)
        file.write(b"?")
    found = MapFile.open(path, writable=True)
    assert found.read_window(0).known.all()
    assert not found.read_window(1).known.any()
    found.close()


@pytest.mark.parametrize("harm", ["flipped", "short", "empty", "missing", "grown"])
def test_a_damaged_header_is_no_map(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "a.map"
    MapFile.create(path, HEADER).close()
    content = bytearray(path.read_bytes())
    match harm:
        case "flipped":
            content[40] ^= 1
        case "short":
            del content[HEADER_BYTES:]
        case "empty":
            content.clear()
        case "grown":
            content += b"\0"
    path.write_bytes(content)
    if harm == "missing":
        path.unlink()
    with pytest.raises(NoMap):
        MapFile.open(path, writable=False)
