"""What travels through the source side of a pass: spans with what is known of them, and the books of each lane."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import trio

from agent.delta.blocks import BLOCK_BYTES, Ranges, Span, positions, split
from agent.delta.compare import Answer, Held, Portion
from agent.delta.compression import Choice
from agent.delta.digests import digests_to_wire
from agent.delta.granularity import Granularity
from agent.delta.pack import Packed, Packer
from agent.sync.budget import ByteBudget
from agent.sync.conversation import Lane
from agent.sync.hashing import Hashed
from agent.sync.payloads import ranges_to_wire
from protocol.messages import CompareSpan, TrackedSpan

T = TypeVar("T")


@dataclass(eq=False)
class Work:
    """A span on its way: read and hashed, asked about, answered, settled (what differs of it is sent).

    Attributes:
        before: the span before it on its lane: questions and data of a lane keep the order of the disk.
        skimmed: it has more data than a buffer holds.
        unasked: its data is sent without being compared.
    """

    span: Span
    lane: Lane
    granularity: Granularity
    buffer: memoryview | None
    before: Work | None
    skimmed: bool
    unasked: bool = False
    hashed: Hashed | None = None
    answer: Answer | None = None
    asked: trio.Event = field(default_factory=trio.Event)
    answered: trio.Event = field(default_factory=trio.Event)
    settled: trio.Event = field(default_factory=trio.Event)

    @property
    def held(self) -> Held:
        """The bytes, which are still there."""
        assert self.hashed is not None
        assert self.hashed.held is not None
        return self.hashed.held

    def question(self) -> tuple[CompareSpan | TrackedSpan, bytes]:
        """What the target is told of the span, and asked about it."""
        span, digests = self.span, b"" if self.hashed is None else digests_to_wire(self.hashed.digests)
        if span.zeroes is None:
            compare = CompareSpan(
                batch=span.number,
                offset_bytes=span.offset_bytes,
                length_bytes=span.length_bytes,
                superblock_bytes=self.granularity.superblock_bytes,
                detail_bytes=self.granularity.detail_bytes,
                count=len(span.data),
            )
            return compare, ranges_to_wire(span.data) + digests
        tracked = TrackedSpan(
            batch=span.number,
            offset_bytes=span.offset_bytes,
            length_bytes=span.length_bytes,
            superblock_bytes=0 if self.unasked else self.granularity.superblock_bytes,
            detail_bytes=0 if self.unasked else self.granularity.detail_bytes,
            data_count=len(span.data),
            zero_count=len(span.zeroes),
        )
        return tracked, ranges_to_wire(span.data) + ranges_to_wire(span.zeroes) + digests


@dataclass
class Found:
    """What comparing the details of a span showed.

    Attributes:
        details: compared; `differing_details` of them.
        differing_blocks: of 64 KiB, in which something differs.
    """

    details: int = 0
    differing_details: int = 0
    differing_blocks: int = 0

    def add(self, portion: Portion, changed: Ranges) -> None:
        """What of a portion must be sent. What the target reads as zero tells nothing of granularity."""
        self.details += len(portion.pieces)
        if len(portion.pieces):
            inside = np.isin(changed[:, 0], portion.superblocks[portion.empty, 0], invert=True)
            self.differing_details += int(inside.sum())
            changed = changed[inside]
        else:
            changed = changed[~portion.empty]
        self.differing_blocks += len(np.unique(split(changed, BLOCK_BYTES)[:, 0] // np.uint64(BLOCK_BYTES)))


@dataclass
class LaneBooks:
    """What one connection has carried of the pass, as `EndOfPass` tells it.

    Attributes:
        settled_batch: the last span of which everything was sent; `untold_bytes`: the data of those settled since the
            target was told.
        ended: `EndOfPass` was said, or is about to be.
        turn: of those who say how far the connection is, so that no older word comes after a newer one.
    """

    ahead: ByteBudget
    settled_batch: int = -1
    untold_bytes: int = 0
    ended: bool = False
    turn: trio.Lock = field(default_factory=trio.Lock)
    pending: dict[int, Work] = field(default_factory=dict)
    last: Work | None = None
    data_bytes: int = 0
    zero_bytes: int = 0
    compared_bytes: int = 0
    unchanged_bytes: int = 0


def chosen(portion: Portion, held: Held, packer: Packer, choice: Choice, seed: int) -> tuple[Ranges, list[Packed]]:
    """What changed of a portion, and the frames made of it."""
    changed = portion.changed(held, seed=seed)
    return changed, packer.pack(held.buffer, changed, held.starts(changed), choice)


def packed_whole(held: Held, packer: Packer, choice: Choice) -> list[Packed]:
    """The frames made of all that is held."""
    return packer.pack(held.buffer, held.ranges, positions(held.ranges), choice)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds it took."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started
