"""Reading what is compared, and hashing it while it is at hand: one thread hop for a whole span."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.delta.blocks import Ranges, as_runs, split, total_bytes
from agent.delta.compare import Answer, Held, Mask, answer, groups, joined
from agent.delta.digests import Digests
from agent.disk.seam import Disk
from agent.sync.payloads import Question


@dataclass(frozen=True, slots=True, eq=False)
class Hashed:
    """A span's data as the source read it.

    Attributes:
        superblocks: shape (n, 2); `digests`: theirs.
        held: the bytes, where they fitted the buffer; None where each part made room for the next.
    """

    superblocks: Ranges
    digests: Digests
    held: Held | None


def read_data(disk: Disk, ranges: Ranges, buffer: memoryview) -> Held:
    """The bytes of `ranges` (shape (n, 2)), end to end at the start of `buffer`. Raises `DiskError`."""
    held = Held(ranges, buffer[: total_bytes(ranges)])
    disk.read_runs(as_runs(ranges), held.buffer)
    return held


def hash_span(disk: Disk, data: Ranges, buffer: memoryview, *, superblock_bytes: int, seed: int) -> Hashed:
    """The source's side of a comparison: read `data` (shape (n, 2)) and hash it.

    Raises:
        DiskError: as the disk says.
    """
    if total_bytes(data) <= buffer.nbytes:
        held = read_data(disk, data, buffer)
        return Hashed(*held.superblocks(superblock_bytes, seed=seed), held)
    superblocks = split(data, superblock_bytes)
    digests = [
        read_data(disk, superblocks[start:end], buffer).superblocks(superblock_bytes, seed=seed)[1]
        for start, end in groups(superblocks[:, 1], buffer.nbytes)
    ]
    return Hashed(superblocks, np.concatenate(digests), None)


def answer_span(disk: Disk, question: Question, buffer: memoryview, *, seed: int) -> tuple[Answer, int]:
    """The target's side: what differs, and how many bytes were read for it; what is known to be zero is not read.

    Raises:
        DiskError: as the disk says.
    """
    superblocks, message = question.superblocks, question.message
    data = holds_data(disk, superblocks)
    answers: list[Answer] = []
    read_bytes = 0
    for start, end in groups(superblocks[:, 1], buffer.nbytes):
        some = superblocks[start:end]
        held = read_data(disk, some[data[start:end]], buffer)
        read_bytes += held.buffer.nbytes
        told = answer(
            some,
            question.digests[start:end],
            held,
            superblock_bytes=message.superblock_bytes,
            detail_bytes=message.detail_bytes,
            seed=seed,
        )
        answers.append(told)
    return joined(answers), read_bytes


def holds_data(disk: Disk, pieces: Ranges) -> Mask:
    """Which of rising pieces (shape (n, 2)) are not known to read as zero, shape (n,).

    Raises:
        DiskError: as the disk says.
    """
    first, end = int(pieces[0, 0]), int(pieces[-1].sum())
    runs = [
        (extent.offset_bytes, extent.offset_bytes + extent.length_bytes)
        for extent in disk.extents(first, end - first)
        if not extent.zero
    ]
    if not runs:
        return np.zeros(len(pieces), dtype=bool)
    data = np.array(runs, dtype=np.uint64)
    at = np.searchsorted(data[:, 1], pieces[:, 0], side="right")
    reached = at < len(data)
    starts = data[np.minimum(at, len(data) - 1), 0]
    return np.asarray(reached & (starts < pieces[:, 0] + pieces[:, 1]))
