"""What the storage is asked about where a source's span reads as zero."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.delta.blocks import to_ranges
from agent.disk.seam import Extent
from agent.sync.writing import within

PLACES = st.lists(st.integers(0, 200), min_size=2, max_size=20, unique=True).map(sorted)


def kinds(extents: list[Extent]) -> dict[int, bool]:
    """What is said of each byte; each is spoken of once."""
    told: dict[int, bool] = {}
    for extent in extents:
        assert extent.length_bytes > 0
        for place in range(extent.offset_bytes, extent.offset_bytes + extent.length_bytes):
            assert place not in told
            told[place] = extent.zero
    return told


@given(PLACES, PLACES, st.booleans())
def test_each_byte_of_the_ranges_is_told_once_and_no_other(cuts: list[int], edges: list[int], zero: bool) -> None:
    extents = [
        Extent(start, end - start, zero=zero ^ bool(number % 2))
        for number, (start, end) in enumerate(pairwise([0, *(cut + 1 for cut in cuts), 300]))
    ]
    ranges = [(start, end - start) for start, end in list(pairwise(edges))[::2]]
    whole = kinds(extents)
    wanted = {place: whole[place] for start, length in ranges for place in range(start, start + length)}
    assert kinds(list(within(extents, to_ranges(ranges)))) == wanted


def test_no_range_asks_nothing() -> None:
    assert list(within([Extent(0, 8, zero=True)], to_ranges([]))) == []
