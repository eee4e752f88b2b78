"""What the blocks of a disk rest on, rung by rung, in the words that each rung may use. Pure.

Digests match, they never prove: xxHash is not collision-resistant. What was written is another matter, since it was
read back and compared with a cryptographic digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MATCHED = "matched (xxh3-128)"


class Line(Protocol):
    """What is read of a line of the report (`coordinator.reports.DiskLine` has it)."""

    @property
    def original(self) -> str:
        """Target name of the disk."""

    @property
    def rung(self) -> str:
        """The rung of the pass."""

    @property
    def past_cache(self) -> bool:
        """Whether its read-back went past the page cache."""


def rung_words(rung: str) -> str:
    """What a block that was not sent rests on."""
    match rung:
        case "bitmap":
            return "unchanged since the view before by dirty bitmap"
        case "overlay":
            return "unchanged since the view before, for the replica wrote to an overlay"
        case "map":
            return f"{MATCHED} with the original's digest map"
        case "extents":
            return "known to read as zero on both sides"
        case _:
            return f"{MATCHED} on both sides"


def evidence_sentence(lines: Sequence[Line]) -> str:
    """One sentence on what the original's disks rest on: what was written, and everything else."""
    if not lines:
        return "no pass was completed: nothing is claimed of the original's disks"
    cache = "past the page cache" if all(line.past_cache for line in lines) else "in part through the page cache only"
    disks: dict[str, list[str]] = {}
    for line in lines:
        named = disks.setdefault(rung_words(line.rung), [])
        if line.original not in named:
            named.append(line.original)
    rest = "; ".join(
        words if len(disks) == 1 else f"{words} ({', '.join(targets)})" for words, targets in disks.items()
    )
    return (
        f"every block written was read back {cache} and equals what the source sent (BLAKE3); every other block: "
        f"{rest}, or known to read as zero on both sides"
    )
