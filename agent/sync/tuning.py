"""What a pass learns while it runs: how finely to compare, how strongly to compress, whether to hold what it reads.

The choices are pure (`agent.delta.granularity`, `agent.delta.compression`); here they are fed with what this pass's
answers, packers and links told.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from agent.delta.compression import Choice, CompressionController, Interval
from agent.delta.granularity import Granularity, GranularityChooser, Seen
from agent.delta.pack import Packed, Packer
from agent.sync.buffers import LEAST_WINDOW_BYTES
from agent.sync.payloads import fitting_frame_bytes

INTERVAL_S = 0.1
"""How often compression is looked at: some frames of the slowest link, and soon enough for a pass of a second."""

QUIET_SHARE, QUIET_SHARE_FAST = 1 / 64, 1 / 8
"""Share of differing data, of what was compared lately, below which spans are skimmed: what differs is read twice. It
may be more where storage is fast: a second read then costs less than many small spans."""
FAST_BYTES_PER_S = 1.5e9
"""Reading and hashing in one thread: page cache and good NVMe drives are faster, SATA drives and NBD are not."""
QUIET_AFTER_BYTES = 64 << 20
"""Compared before a pass without a past may call a disk quiet."""
SCARCE_BYTES_PER_S = 250_000_000
"""A limit of the network up to which a processor or two compress at level 3 without being in the way."""
_MEMORY_BYTES = 128 << 20  # of compared data after which what was seen counts by 1/e
_KEPT = 256  # disks whose last pass is remembered


@dataclass
class Tuning:
    """The choices of one disk's pass; used in trio's thread alone, but for the packer.

    Attributes:
        start: what the last pass over the disk ended with.
        link_is_scarce: the network is limited on purpose, so bytes are dearer than processor time.
        window_bytes: the smallest window of its connections, which every frame must fit whole.
    """

    start: Granularity | None = None
    was_quiet: bool = False
    packer: Packer = field(default_factory=Packer)
    link_is_scarce: bool = False
    window_bytes: int = LEAST_WINDOW_BYTES

    def __post_init__(self) -> None:
        self._chooser = GranularityChooser(self.start)
        self._controller = CompressionController(link_is_scarce=self.link_is_scarce)
        self._known_bytes = QUIET_AFTER_BYTES if self.was_quiet else 0
        self._differing_share = 0.0
        self._seconds_per_byte = 0.0
        self._packing_s = 0.0
        self._plain_bytes = 0
        self._stored_bytes = 0

    # --- granularity ----------------------------------------------------------------------------------------------

    @property
    def granularity(self) -> Granularity:
        """What the next span is asked about in."""
        return self._chooser.choice

    @property
    def quiet(self) -> bool:
        """Whether so little differs that holding what was read does not pay."""
        is_fast = 0.0 < self._seconds_per_byte < 1 / FAST_BYTES_PER_S
        share = QUIET_SHARE_FAST if is_fast else QUIET_SHARE
        return self._known_bytes >= QUIET_AFTER_BYTES and self._differing_share < share

    def read(self, size_bytes: int, seconds: float) -> None:
        """So much was read and hashed by one thread in that time."""
        known = self._seconds_per_byte > 0.0
        weight = 1 - math.exp(-size_bytes / _MEMORY_BYTES) if known else 1.0
        self._seconds_per_byte += weight * (seconds / size_bytes - self._seconds_per_byte)

    def learn(self, seen: Seen, *, compared_bytes: int, differing_bytes: int) -> None:
        """A span was answered and what differs of it is known.

        Args:
            seen: of the superblocks that the target does not read as zero: the others tell nothing of granularity.
            compared_bytes, differing_bytes: of all its data.
        """
        self._chooser.learn(seen)
        self._known_bytes += compared_bytes
        weight = 1 - math.exp(-compared_bytes / _MEMORY_BYTES)
        self._differing_share += weight * (differing_bytes / compared_bytes - self._differing_share)

    def ended_with(self) -> Granularity:
        """What the next pass over the disk should start with."""
        return self._chooser.snapshot()

    # --- compression ----------------------------------------------------------------------------------------------

    @property
    def compression(self) -> Choice:
        """How the next span's frames are made."""
        choice = self._controller.choice
        return replace(choice, frame_bytes=min(choice.frame_bytes, fitting_frame_bytes(self.window_bytes)))

    @property
    def link_is_dear(self) -> bool:
        """Whether a byte on the link costs more than comparing it does: it is limited on purpose, or was what was
        waited for lately. What is known to have been written is then compared before it is sent."""
        return self.link_is_scarce or self._controller.link_bound

    def packed(self, frames: Iterable[Packed], packing_s: float) -> None:
        """Frames were made in so many thread-seconds."""
        self._packing_s += packing_s
        for packed in frames:
            if not packed.zero:
                self._plain_bytes += packed.plain_bytes
                self._stored_bytes += packed.stored_bytes

    def observe(
        self, *, wall_s: float, link_limited_s: float, receiver_limited_s: float, packers: int, idle_share: float = 1.0
    ) -> None:
        """A stretch of time is over; what was packed in it is known here."""
        self._controller.observe(
            Interval(
                wall_s=wall_s,
                link_limited_s=link_limited_s,
                receiver_limited_s=receiver_limited_s,
                packing_s=self._packing_s,
                packers=packers,
                plain_bytes=self._plain_bytes,
                stored_bytes=self._stored_bytes,
                idle_share=idle_share,
            )
        )
        self._packing_s, self._plain_bytes, self._stored_bytes = 0.0, 0, 0


class Tunings:
    """What the last passes of this host's disks ended with; lost with the process, which costs the next pass little."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str], tuple[Granularity, bool]] = OrderedDict()

    def begin(self, vm_uuid: str, target: str, network_bytes_per_s: int | None) -> Tuning:
        """The tuning of a new pass over that disk, under that limit of the network."""
        granularity, quiet = self._last.get((vm_uuid, target), (None, False))
        scarce = network_bytes_per_s is not None and network_bytes_per_s <= SCARCE_BYTES_PER_S
        return Tuning(granularity, quiet, link_is_scarce=scarce)

    def end(self, vm_uuid: str, target: str, tuning: Tuning) -> None:
        """A pass is complete."""
        self._last.pop((vm_uuid, target), None)
        self._last[vm_uuid, target] = (tuning.ended_with(), tuning.quiet)
        while len(self._last) > _KEPT:
            self._last.popitem(last=False)
