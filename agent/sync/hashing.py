"""Reading what is compared, and hashing it while it is at hand: one thread hop for a whole span."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from agent.delta.blocks import Ranges, as_runs, split, total_bytes
from agent.delta.compare import Answer, Held, Mask, answer, groups, joined, same
from agent.delta.digests import DIGEST_BYTES, Digests, block_digests, digests_from_wire, superblock_digests
from agent.disk.seam import Disk
from agent.sync.pass_map import PassMap
from agent.sync.payloads import Question

STEP_BYTES = 4 << 20
"""How much is read before it is hashed: large requests for the storage, and the bytes are still in the processor's
caches when they are hashed."""


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
    """The source's side of a comparison: read `data` (shape (n, 2)) and hash it while it is in the processor's caches.

    Raises:
        DiskError: as the disk says.
    """
    size = total_bytes(data)
    keeps = size <= buffer.nbytes
    blocks: list[bytes] = []
    at = 0
    for runs in _steps(data, min(STEP_BYTES, buffer.nbytes)):
        part = buffer[at : at + sum(length for _, length in runs)]
        disk.read_runs(runs, part)
        blocks += _blocks(runs, part, seed)
        at += part.nbytes if keeps else 0
    digests = superblock_digests(data.tolist(), blocks, superblock_bytes, seed=seed)
    return Hashed(
        split(data, superblock_bytes),
        digests_from_wire(b"".join(digests)),
        Held(data, buffer[:size]) if keeps else None,
    )


def _steps(data: Ranges, step_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges as runs that are read at once: `step_bytes` each, whole blocks, but for what is left at the end of one."""
    pieces = split(data, step_bytes)
    runs: list[tuple[int, int]] = pieces.tolist()
    for start, end in groups(pieces[:, 1], step_bytes):
        yield runs[start:end]


def answer_span(
    disk: Disk, question: Question, buffer: memoryview, *, seed: int, digest_map: PassMap | None = None
) -> tuple[Answer, int]:
    """The target's side: what differs, and how many bytes were read for it; what is known to be zero is not read. The
    map, if there is one, learns what is read.

    Raises:
        DiskError: as the disk says.
    """
    superblocks, message = question.superblocks, question.message
    is_data = holds_data(disk, superblocks)
    pieces: list[tuple[int, int]] = [(offset, length) for offset, length in superblocks.tolist()]
    theirs = question.digests.tobytes()
    answers: list[Answer] = []
    read_bytes = 0
    if digest_map is not None and not is_data.all():
        digest_map.enter_zeroes(as_runs(superblocks[~is_data]))
    for start, end in groups(superblocks[:, 1], max(min(STEP_BYTES, buffer.nbytes), message.superblock_bytes)):
        runs = _merged(compress(pieces[start:end], is_data[start:end].tolist()))
        part = buffer[: sum(length for _, length in runs)]
        disk.read_runs(runs, part)
        read_bytes += part.nbytes
        blocks = _blocks(runs, part, seed)
        if digest_map is not None and blocks:
            digest_map.enter(runs, blocks)
        digests = superblock_digests(runs, blocks, message.superblock_bytes, seed=seed)
        ours = b"".join(digests)
        # Where all is the same, one comparison of bytes tells; the arithmetic is for where it is not.
        if len(digests) == end - start and ours == theirs[start * DIGEST_BYTES : end * DIGEST_BYTES]:
            answers.append(same(end - start))
            continue
        some = superblocks[start:end]
        told = answer(
            some,
            question.digests[start:end],
            Held(some[is_data[start:end]], part),
            superblock_bytes=message.superblock_bytes,
            detail_bytes=message.detail_bytes,
            seed=seed,
            ours=digests_from_wire(ours),
        )
        answers.append(told)
    return joined(answers), read_bytes


def _merged(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rising pieces as runs, those joined that adjoin."""
    runs: list[tuple[int, int]] = []
    begin = behind = -1
    for offset, length in pieces:
        if offset != behind:
            if begin >= 0:
                runs.append((begin, behind - begin))
            begin = offset
        behind = offset + length
    if begin >= 0:
        runs.append((begin, behind - begin))
    return runs


def _blocks(runs: Sequence[tuple[int, int]], buffer: memoryview, seed: int) -> list[bytes]:
    """The digest of each block of runs that lie end to end in `buffer`."""
    blocks: list[bytes] = []
    at = 0
    for _, length in runs:
        blocks += block_digests(buffer[at : at + length], seed=seed)
        at += length
    return blocks


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
