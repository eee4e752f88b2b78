"""Passes as the coordinator orders them, and their books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.orders import Done
from protocol.messages.words import ByteRange, Direction, Order, PassKind


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedDisk:
    """One disk of a grant: its name at the agent that is told, its name at the peer, its size at the source and
    at the target (a larger target is zeroed behind the source's end).

    `since`: both sides have proven that the target equals that view, so that only what was written since then is sent,
    without comparing. `digest_seed`: the seed of the target's digest map, which then stands for the target's blocks.
    """

    target: str
    peer_target: str
    source_size_bytes: int
    target_size_bytes: int
    since: str | None = None
    digest_seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What the bulk connections of one pass may do; told to both agents beforehand.

    Attributes:
        grant: 128 random bits, hex.
        direction: what the agent that is told does.
        peer_fingerprint: SHA-256 (hex) of the only certificate the other end may show.
        view: the view the target is made equal to, or is compared with.
        kind: what the pass is for.
    """

    grant: str
    vm_uuid: str
    direction: Direction
    peer_fingerprint: str
    view: str
    disks: tuple[GrantedDisk, ...]
    kind: PassKind = PassKind.SYNC


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """What a pass did to one disk, in bytes of disk unless it says otherwise. Sender and receiver each fill what they
    know; what a side does not know is 0.

    Attributes:
        target: the disk's name at the reporting side.
        size_bytes: the source's size.
        zero_bytes: known to read as zero at the source, not read.
        compared_bytes: read and hashed on this side; of what was sent without comparing, what the source read for it.
        changed_bytes: what differed and was sent as data: of blocks, or of pages within them.
        wire_bytes: everything the disk's bulk connections carried, both ways, before TLS.
        written_bytes, zeroed_bytes: what the target wrote and what it zeroed or discarded.
        verified_bytes: read back at the target and equal to the source's BLAKE3 digest, or to zero.
        rung: the rung of evidence used (DESIGN: ``digests``, ``extents`` …) and `why_not_higher`, a sentence.
        past_cache: whether the read-back went past the page cache.
        frames: how many frames of data were sent, by how they were stored: ``raw``, or ``zstd`` and the level.
        stored_bytes: what `changed_bytes` became in those frames.
        lanes: connections used.
        superblock_bytes, detail_bytes: the granularity of comparing that the pass ended with.
        access: how this side read the disk, in words.
        differing_bytes: in a pass that only compares: what differs; `differing`: where, the first 64 stretches.
        unchanged_bytes: not written since the view that the grant's `since` names, so neither read nor sent.
        resumed_bytes: proven against the same view by an earlier attempt, so neither read nor sent again. With
            `zero_bytes`, `compared_bytes` and `unchanged_bytes` of the source it is the whole disk: these, and what was
            changed, written and verified, are counts of the latest attempt.
        reconnects: how often the connections were lost and made again within this pass.
        earlier_compared_bytes, earlier_changed_bytes: counts of those attempts of this pass that were cut: of what was
            read and sent in them, some is in `resumed_bytes`, and the rest was done twice.
    """

    target: str
    size_bytes: int
    zero_bytes: int
    compared_bytes: int
    changed_bytes: int
    wire_bytes: int
    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    rung: str
    why_not_higher: str
    past_cache: bool
    frames: dict[str, int]
    stored_bytes: int
    lanes: int
    superblock_bytes: int
    detail_bytes: int
    access: str
    differing_bytes: int = 0
    differing: tuple[ByteRange, ...] = ()
    unchanged_bytes: int = 0
    resumed_bytes: int = 0
    reconnects: int = 0
    earlier_compared_bytes: int = 0
    earlier_changed_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """A pass is complete on the reporting side: every range is proven against `view`."""

    view: str
    elapsed_s: float
    disks: tuple[DiskReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskProgress:
    """How far one disk is. `done_bytes` of `total_bytes` (source size, or what was written since the granted view) are
    settled: compared, and sent where they differed. `reconnects`: how often its connections were lost so far;
    `reconnecting`: they are lost now, and are being made again."""

    target: str
    total_bytes: int
    done_bytes: int
    zero_bytes: int
    changed_bytes: int
    wire_bytes: int
    reconnects: int = 0
    reconnecting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """Pushed by the source agent about twice a second while `RunPass` works."""

    disks: tuple[DiskProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowPass:
    """Store the grant. A grant lives until its pass ends, a newer one comes for the pair, or the agent restarts."""

    order: Order
    grant: Grant
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPass:
    """Carry out the granted pass. The sender connects to `peer_host`:`peer_port` (certificate name `peer_name`); the
    receiver waits for it and gives those as ``""``, 0, ``""``. The receiver durably marks the original torn before
    its first write.

    `limit_network`, `limit_read`: bytes/s that this agent may send and read in the pass, all disks together; None:
    no limit."""

    order: Order
    grant: str
    peer_name: str
    peer_host: str
    peer_port: int
    limit_network: int | None = None
    limit_read: int | None = None
    reply: ClassVar[type] = PassReport


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLimits:
    """Other limits (as in `RunPass`, both) for the pass of the pair that is granted or running here, from now on.

    What it says stands also against a `RunPass` of the same grant that is read after it. Harmless when there is no
    pass; nothing is remembered beyond it."""

    order: Order
    limit_network: int | None
    limit_read: int | None
    reply: ClassVar[type] = Done
