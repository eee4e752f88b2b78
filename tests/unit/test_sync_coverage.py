"""Which of a disk was spoken of: each byte in exactly one span."""

from __future__ import annotations

import random

import pytest

from agent.sync.payloads import MAX_STRETCHES, Coverage
from protocol.errors import PeerViolation


def test_a_disk_is_covered_by_spans_in_any_order() -> None:
    dice = random.Random(1)
    cuts = sorted(dice.sample(range(1, 1000), 50))
    spans = list(zip([0, *cuts], [*cuts, 1000], strict=True))
    dice.shuffle(spans)
    coverage = Coverage(1000)
    for start, end in spans:
        assert not coverage.complete
        coverage.claim(start, end - start)
    assert coverage.complete
    assert coverage.covered_bytes == 1000


def test_spans_in_order_leave_one_run_in_the_books() -> None:
    coverage = Coverage(10_000)
    for start in range(0, 10_000, 10):
        coverage.claim(start, 10)
        assert len(coverage._starts) == 1
    assert coverage.complete


def test_spans_of_several_connections_leave_few_runs_in_the_books() -> None:
    coverage = Coverage(1000)
    for number in (1, 0, 3, 2, 5, 4):
        coverage.claim(number * 10, 10)
        assert len(coverage._starts) <= 2
    assert coverage.covered_bytes == 60


@pytest.mark.parametrize("span", [(10, 10), (0, 11), (19, 1), (5, 100), (12, 3), (19, 21), (35, 6), (40, 1), (0, 1000)])
def test_what_was_spoken_of_cannot_be_spoken_of_again(span: tuple[int, int]) -> None:
    coverage = Coverage(1000)
    coverage.claim(10, 10)
    coverage.claim(40, 20)
    with pytest.raises(PeerViolation, match=f"span of {span[1]} bytes at offset {span[0]} was spoken of before"):
        coverage.claim(*span)
    assert coverage.covered_bytes == 30
    coverage.claim(0, 10)
    coverage.claim(20, 20)
    coverage.claim(60, 940)
    assert coverage.complete


def test_a_hole_of_terabytes_is_one_claim() -> None:
    coverage = Coverage(8 << 40)
    coverage.claim(0, 8 << 40)
    assert coverage.complete


def test_a_peer_that_leaves_gap_after_gap_is_stopped() -> None:
    coverage = Coverage(8 << 40)
    for number in range(MAX_STRETCHES):
        coverage.claim(2 * number * 65536, 65536)
    with pytest.raises(PeerViolation, match="one more gap than the 4096 allowed"):
        coverage.claim(2 * MAX_STRETCHES * 65536, 65536)
    coverage.claim(65536, 65536)  # closing one is welcome
