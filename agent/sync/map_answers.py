"""The target's answer to a span where it keeps a digest map: only what the map does not know is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.delta.blocks import BLOCK_BYTES, Ranges, as_runs, coalesce, split, total_bytes
from agent.delta.compare import Answer, Held, detail_pieces, differing, groups
from agent.delta.digest_map import Entries, Known
from agent.delta.digests import DIGEST_BYTES, Digests, digests_from_wire, superblock_digests
from agent.disk.seam import Disk
from agent.errors import SyncError
from agent.sync.hashing import STEP_BYTES, answer_span, holds_data, read_data
from agent.sync.pass_map import PassMap
from agent.sync.payloads import Question


class MapContradicted(SyncError):
    """The disk holds something else than its map says, though nobody should have written to it."""

    code = "map-contradicted"


@dataclass(frozen=True, slots=True)
class Answered:
    """How a span was answered.

    Attributes:
        read_bytes: of the disk.
        mapped_bytes: of the span's data, known from the map.
    """

    answer: Answer
    read_bytes: int
    mapped_bytes: int


def answer_with_map(
    disk: Disk, question: Question, buffer: memoryview, *, seed: int, digest_map: PassMap | None
) -> Answered:
    """What differs, and what was read to tell.

    Raises:
        DiskError: as the disk says.
        MapContradicted: the map is given up.
    """
    if digest_map is None or not digest_map.knows_something(as_runs(question.data)):
        answer, read_bytes = answer_span(disk, question, buffer, seed=seed, digest_map=digest_map)
        return Answered(answer, read_bytes, 0)
    return _Answering(disk, question, buffer, seed, digest_map).answered()


@dataclass
class _Answering:
    disk: Disk
    question: Question
    buffer: memoryview
    seed: int
    digest_map: PassMap
    read_bytes: int = 0

    def answered(self) -> Answered:
        blocks = split(self.question.data, BLOCK_BYTES)
        entries, known = self.digest_map.look_up(as_runs(self.question.data))
        mapped_bytes = total_bytes(blocks[known])
        if not known.all():
            self._fill(blocks, entries, known)
        digests = _each(entries)
        superblock_bytes = self.question.message.superblock_bytes
        ours = digests_from_wire(
            b"".join(superblock_digests(self.question.data.tolist(), digests, superblock_bytes, seed=self.seed))
        )
        differs = differing(ours, self.question.digests)
        owner = np.searchsorted(self.question.superblocks[:, 0], blocks[:, 0], side="right") - 1
        zero = self._zero(blocks, entries)
        filled = np.zeros(len(differs), dtype=bool)
        filled[owner[~zero]] = True  # something in it is not zero
        empty = differs & ~filled
        details = self._details(blocks, entries, self.question.superblocks[differs & ~empty])
        return Answered(Answer(differs, empty, details), self.read_bytes, mapped_bytes)

    def _fill(self, blocks: Ranges, entries: Entries, known: Known) -> None:
        """Read what the map does not know, and tell it."""
        unknown = np.flatnonzero(~known)
        is_data = holds_data(self.disk, blocks[unknown])
        zeroes = unknown[~is_data]
        shape = self.digest_map.shape
        for index in zeroes.tolist():
            entries[index] = shape.zero_entries(int(blocks[index, 0]) // BLOCK_BYTES, 1)[0]
        self.digest_map.enter_zeroes(as_runs(blocks[zeroes]))
        data = unknown[is_data]
        most = min(STEP_BYTES, self.buffer.nbytes)
        for start, end in groups(blocks[data, 1], most):
            some = data[start:end]
            digests = self._hash(read_data(self.disk, blocks[some], self.buffer))
            self.digest_map.enter(as_runs(blocks[some]), digests)
            entries[some] = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(some), -1)

    def _hash(self, held: Held) -> list[bytes]:
        self.read_bytes += held.buffer.nbytes
        return Held(coalesce(held.ranges), held.buffer).blocks(seed=self.seed)

    def _zero(self, blocks: Ranges, entries: Entries) -> Known:
        """Which blocks hold zeroes, shape (n,)."""
        shape = self.digest_map.shape
        zero = (entries == shape.zero_entries(0, 1)[0]).all(axis=1)
        last = int(blocks[-1, 0]) // BLOCK_BYTES
        zero[-1] = bool((entries[-1] == shape.zero_entries(last, 1)[0]).all())
        return np.asarray(zero)

    def _details(self, blocks: Ranges, entries: Entries, superblocks: Ranges) -> Digests:
        """Digests of the details of the superblocks: of whole blocks from the map, of pages from the disk."""
        message = self.question.message
        pieces = detail_pieces(superblocks, message.superblock_bytes, message.detail_bytes)
        if not len(pieces):
            return digests_from_wire(b"")
        if message.detail_bytes == BLOCK_BYTES:
            at = np.searchsorted(blocks[:, 0], pieces[:, 0])
            return digests_from_wire(entries[at].tobytes())
        details: list[Digests] = []
        for start, end in groups(superblocks[:, 1], self.buffer.nbytes):
            some = superblocks[start:end]
            held = read_data(self.disk, some, self.buffer)
            self._check(blocks, entries, some, self._hash(held))
            details.append(held.details(split(some, message.detail_bytes), seed=self.seed))
        return digests_from_wire(b"".join(each.tobytes() for each in details))

    def _check(self, blocks: Ranges, entries: Entries, superblocks: Ranges, digests: list[bytes]) -> None:
        """Where the disk is read all the same it must hold what the map says: or the map is wrong elsewhere as well."""
        inside = split(superblocks, BLOCK_BYTES)
        at = np.searchsorted(blocks[:, 0], inside[:, 0])
        if entries[at].tobytes() == b"".join(digests):
            return
        wrong = next(i for i, digest in zip(at.tolist(), digests, strict=True) if entries[i].tobytes() != digest)
        offset = int(blocks[wrong, 0])
        self.digest_map.give_up(f"the disk holds something else at offset {offset} than the map says")
        raise MapContradicted(
            f"disk {self.disk.name}: what it holds at offset {offset} is not what was written there, as its digest map "
            "knows it: somebody wrote to it past the image locks, or the storage does not keep what is written; the "
            "map was removed, so run the pass again, which reads the whole disk",
            disk=self.disk.name,
            offset_bytes=offset,
        )


def _each(entries: Entries) -> list[bytes]:
    plain = entries.tobytes()
    return [plain[at : at + DIGEST_BYTES] for at in range(0, len(plain), DIGEST_BYTES)]
