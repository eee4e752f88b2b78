"""Runs of a batch: many places of a disk whose bytes lie end to end in one buffer. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Run = tuple[int, int]
"""Offset in bytes, length in bytes."""


def problem_of(runs: Sequence[Run], size_bytes: int, buffer_bytes: int) -> tuple[str, Run] | None:
    """What is wrong with a batch, as a clause, and the run it is about; None when it may be carried out.

    Runs must rise and not overlap, so that the order in which they are carried out makes no difference.

    Args:
        runs: of the batch.
        size_bytes: where the disk ends.
        buffer_bytes: what the caller's buffer holds.
    """
    behind, total = 0, 0
    for offset_bytes, length_bytes in runs:
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > size_bytes:
            clause = f"that is outside the disk's {size_bytes} bytes; check that both disks have the size expected"
            return clause, (offset_bytes, length_bytes)
        if offset_bytes < behind:
            clause = "the runs of a batch must rise and not overlap; report this as a fault of the program"
            return clause, (offset_bytes, length_bytes)
        behind, total = offset_bytes + length_bytes, total + length_bytes
    if total != buffer_bytes:
        clause = f"the runs have {total} bytes and their buffer {buffer_bytes}; report this as a fault of the program"
        return clause, (runs[0][0] if runs else 0, total)
    return None


def joined(runs: Sequence[Run]) -> Iterator[Run]:
    """The same bytes in fewer runs: those that adjoin become one, empty ones disappear."""
    start, behind = -1, -1
    for offset_bytes, length_bytes in runs:
        if length_bytes == 0:
            continue
        if offset_bytes != behind:
            if start >= 0:
                yield start, behind - start
            start = offset_bytes
        behind = offset_bytes + length_bytes
    if start >= 0:
        yield start, behind - start
