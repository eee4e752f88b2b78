"""The choice of superblock and detail sizes, on simulated disks: which pages changed is drawn, what a batch then shows
and costs is counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.delta.granularity import OPTIONS, Granularity, GranularityChooser, Seen

KIB, MIB = 1 << 10, 1 << 20
BATCH_BYTES = 8 * MIB
PAGES = BATCH_BYTES // (4 * KIB)
BATCHES = 256  # 2 GiB

Pages = NDArray[np.bool_]  # of one batch, whether each changed
Pattern = Callable[[np.random.Generator], Pages]


def per(pages: Pages, size_bytes: int) -> NDArray[np.bool_]:
    """Whether each run of a size holds a changed page."""
    return np.asarray(pages.reshape(-1, size_bytes // (4 * KIB)).any(axis=1), dtype=np.bool_)


def seen(pages: Pages, asked: Granularity) -> Seen:
    superblocks, details = per(pages, asked.superblock_bytes), per(pages, asked.detail_bytes)
    differing = int(superblocks.sum())
    same_size = asked.superblock_bytes == asked.detail_bytes
    return Seen(
        compared_bytes=BATCH_BYTES,
        superblock_bytes=asked.superblock_bytes,
        detail_bytes=asked.detail_bytes,
        superblocks=len(superblocks),
        differing_superblocks=differing,
        details=0 if same_size else differing * (asked.superblock_bytes // asked.detail_bytes),
        differing_details=0 if same_size else int(details.sum()),
        differing_blocks=int(per(pages, 64 * KIB).sum()),
    )


def cost(pages: Pages, asked: Granularity) -> float:
    """Bytes on the wire beyond the pages that changed."""
    shown = seen(pages, asked)
    in_vain = int(per(pages, asked.detail_bytes).sum()) * asked.detail_bytes - int(pages.sum()) * 4 * KIB
    return shown.superblocks * 16.25 + shown.details * 16 + in_vain


def nothing(_: np.random.Generator) -> Pages:
    return np.zeros(PAGES, dtype=bool)


def everything(_: np.random.Generator) -> Pages:
    return np.ones(PAGES, dtype=bool)


def scattered(share: float, pages: int) -> Pattern:
    """Blocks of 64 KiB at random, with some changed pages in each."""

    def draw(chance: np.random.Generator) -> Pages:
        changed = np.zeros((PAGES // 16, 16), dtype=bool)
        for block in np.flatnonzero(chance.random(len(changed)) < share):
            changed[block, chance.choice(16, pages, replace=False)] = True
        return changed.reshape(-1)

    return draw


def clustered(share: float, run_bytes: int, density: float) -> Pattern:
    """Runs at random, aligned to nothing, within which that share of the pages changed."""

    def draw(chance: np.random.Generator) -> Pages:
        changed = np.zeros(PAGES, dtype=bool)
        length = min(run_bytes // (4 * KIB), PAGES)
        for _ in range(chance.poisson(share * PAGES / length)):
            first = int(chance.integers(0, PAGES - length + 1))
            changed[first : first + length] |= chance.random(length) < density
        return changed

    return draw


def mixed(*patterns: Pattern) -> Pattern:
    """A batch of one or the other."""
    return lambda chance: patterns[chance.integers(len(patterns))](chance)


PATTERNS: dict[str, Pattern] = {
    "identical": nothing,
    "everything": everything,
    "3% of the blocks, two pages each": scattered(0.03, 2),
    "3% of the blocks, whole": scattered(0.03, 16),
    "1% of the blocks, one page each": scattered(0.01, 1),
    "0.1% of the blocks, two pages each": scattered(0.001, 2),
    "0.02% of the blocks, one page each": scattered(0.0002, 1),
    "30% of the blocks, three pages each": scattered(0.3, 3),
    "80% of the blocks, whole": scattered(0.8, 16),
    "3% in runs of 1 MiB, sparse inside": clustered(0.03, MIB, 0.1),
    "3% in runs of 4 MiB, full": clustered(0.03, 4 * MIB, 1.0),
    "10% in runs of 512 KiB, full": clustered(0.1, 512 * KIB, 1.0),
    "half of the batches identical": mixed(nothing, scattered(0.06, 2)),
}


@pytest.mark.parametrize("start", [None, Granularity(64 * KIB, 64 * KIB), Granularity(4 * MIB, 64 * KIB)])
@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_chosen_costs_little_more_than_the_best_fixed_sizes(name: str, start: Granularity | None) -> None:
    chance = np.random.default_rng(7)
    batches = [PATTERNS[name](chance) for _ in range(BATCHES)]
    chooser = GranularityChooser(start)
    settled = 0.0
    for number, pages in enumerate(batches):
        if number >= BATCHES // 2:
            settled += cost(pages, chooser.snapshot())
        chooser.learn(seen(pages, chooser.choice))
    best = min(sum(cost(pages, option) for pages in batches[BATCHES // 2 :]) for option in OPTIONS)
    assert settled <= 1.15 * best, chooser.snapshot()


@pytest.mark.parametrize("name", PATTERNS)
def test_looking_elsewhere_now_and_then_costs_next_to_nothing(name: str) -> None:
    chance = np.random.default_rng(8)
    asked, settled = 0.0, 0.0
    chooser = GranularityChooser()
    for _ in range(BATCHES):
        pages = PATTERNS[name](chance)
        sent = int(pages.sum()) * 4 * KIB
        asked += sent + cost(pages, chooser.choice)
        settled += sent + cost(pages, chooser.snapshot())
        chooser.learn(seen(pages, chooser.choice))
    assert asked <= 1.05 * settled


def settle(pattern: Pattern, mebibytes: int, start: Granularity | None = None) -> Granularity:
    chance = np.random.default_rng(9)
    chooser = GranularityChooser(start)
    for _ in range(mebibytes // 8):
        chooser.learn(seen(pattern(chance), chooser.choice))
    return chooser.snapshot()


def test_it_starts_with_a_mebibyte_and_pages() -> None:
    assert GranularityChooser().choice == Granularity(MIB, 4 * KIB)


def test_identical_disks_settle_on_the_largest_superblocks_after_64_mib() -> None:
    assert settle(nothing, 64).superblock_bytes == 4 * MIB


def test_a_disk_changed_all_over_needs_no_details() -> None:
    assert settle(everything, 128) == Granularity(64 * KIB, 64 * KIB)


def test_scattered_small_changes_want_small_superblocks_and_pages() -> None:
    chosen = settle(scattered(0.03, 2), 512)
    assert chosen.superblock_bytes in (64 * KIB, 256 * KIB)
    assert chosen.detail_bytes == 4 * KIB


def test_clustered_changes_want_superblocks_of_a_mebibyte() -> None:
    assert settle(clustered(0.01, MIB, 0.5), 2048).superblock_bytes == MIB


def test_the_choice_survives_as_the_start_of_the_next_pass() -> None:
    first = settle(scattered(0.03, 2), 512)
    assert GranularityChooser(first).choice == first
    assert settle(scattered(0.03, 2), 512, first) == first


def test_a_start_that_is_no_option_is_not_followed() -> None:
    assert GranularityChooser(Granularity(12345, 1)).choice == Granularity(MIB, 4 * KIB)


def test_changes_that_begin_to_scatter_are_followed() -> None:
    chooser = GranularityChooser()
    chance = np.random.default_rng(10)
    settled = []
    for pattern in (nothing, scattered(0.03, 2), nothing):
        for _ in range(160):
            chooser.learn(seen(pattern(chance), chooser.choice))
        settled.append(chooser.snapshot().superblock_bytes)
    assert settled[0] == 4 * MIB
    assert settled[1] <= 256 * KIB
    assert settled[2] >= MIB


def test_pages_are_looked_at_now_and_then_even_where_whole_blocks_are_sent() -> None:
    chooser = GranularityChooser(Granularity(64 * KIB, 64 * KIB))
    chance = np.random.default_rng(11)
    asked = []
    for _ in range(100):
        asked.append(chooser.choice)
        chooser.learn(seen(everything(chance), chooser.choice))
    others = [option for option in asked if option != Granularity(64 * KIB, 64 * KIB)]
    assert 2 <= len(others) <= 4
    assert {option.detail_bytes for option in others} == {4 * KIB}


def test_a_batch_of_nothing_teaches_nothing() -> None:
    chooser = GranularityChooser()
    for _ in range(100):
        chooser.learn(Seen(0, MIB, 4 * KIB, 0, 0, 0, 0, 0))
    assert chooser.choice == Granularity(MIB, 4 * KIB)
