"""Samples as the in-memory agents give them: data of a size, of which so many blocks of a hundred differ."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.errors import AgentRefused
from protocol.messages import BlockSamples, SampleBlocks

BLOCK_BYTES = 64 * 1024


@dataclass
class FakeSamples:
    """What both hosts' agents see.

    Attributes:
        data_blocks: of each disk of either side.
        differ_percent: so many of a hundred blocks differ, beginning with the first.
        read_bytes_s: pace of either side.
        refused: targets that cannot be sampled on the production host.
        asked: every question, with the host.
    """

    data_blocks: int = 16
    differ_percent: int = 25
    read_bytes_s: float = 100e6
    refused: set[str] = field(default_factory=set)
    asked: list[tuple[str, SampleBlocks]] = field(default_factory=list)

    def answer(self, host: str, request: SampleBlocks) -> BlockSamples:
        """See `protocol.messages.SampleBlocks`."""
        self.asked.append((host, request))
        if request.target in self.refused and host == "prod":
            raise AgentRefused(f"disk {request.target} cannot be read: its storage hangs", code="disk", host=host)
        count = min(request.choose, self.data_blocks)
        offsets = request.offsets or tuple(number * BLOCK_BYTES for number in range(count))
        digests = b"".join(self._digest(host, offset // BLOCK_BYTES) for offset in offsets)
        return BlockSamples(
            digests=digests,
            data_bytes=self.data_blocks * BLOCK_BYTES,
            read_bytes_s=self.read_bytes_s,
            offsets=offsets if request.choose else (),
        )

    def _digest(self, host: str, block: int) -> bytes:
        differs = block % 100 < self.differ_percent * min(100, self.data_blocks) // 100
        return block.to_bytes(8, "little") + (host if differs else "same").encode().ljust(8)
