"""The controller of compression, in a simulated data path: values in, choices out."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from agent.delta.compression import Choice, CompressionController, Interval

MIB = 1 << 20
GBIT = 125e6  # bytes/s

# Of one core in bytes/s, and stored by plain bytes, of system files.
SPEED = {None: 1e15, -20: 1.2e9, -5: 0.7e9, -1: 0.5e9, 1: 0.42e9, 3: 0.25e9, 5: 0.13e9, 6: 0.09e9, 9: 0.05e9}
SHARE = {None: 1.0, -20: 0.85, -5: 0.7, -1: 0.62, 1: 0.5, 3: 0.47, 5: 0.455, 6: 0.45, 9: 0.44}
LEVELS = list(SPEED)


@dataclass
class Path:
    """A data path in which the slowest part decides; each part is waited for as it is the one."""

    link: float
    packers: int = 2
    receiver: float = 1e12
    source: float = 3e9
    core: float = 1.0  # share of a core that a packer gets
    shrinks: bool = True

    def interval(self, choice: Choice, wall_s: float = 0.5) -> Interval:
        cost = 1 / 5e9
        share = 1.0
        if choice.level is not None:
            # A sample of each frame is all that packing costs where data does not shrink.
            cost += 1 / SPEED[choice.level] if self.shrinks else 1 / 50e9
            share = SHARE[choice.level] if self.shrinks else 1.0
        cost /= self.core
        limits = {
            "link": self.link / share,
            "receiver": self.receiver,
            "packing": self.packers / cost,
            "source": self.source,
        }
        slowest = min(limits, key=lambda name: limits[name])
        rate = limits[slowest]
        return Interval(
            wall_s=wall_s,
            link_limited_s=wall_s * (0.9 if slowest == "link" else 0.02),
            receiver_limited_s=wall_s * (0.9 if slowest == "receiver" else 0.02),
            packing_s=rate * cost * wall_s,
            packers=self.packers,
            plain_bytes=int(rate * wall_s),
            stored_bytes=int(rate * share * wall_s),
        )


def run(controller: CompressionController, path: Path, intervals: int) -> list[int | None]:
    """The levels that held after each of some intervals."""
    return [controller.observe(path.interval(controller.choice)).level for _ in range(intervals)]


def rungs(levels: list[int | None]) -> list[int]:
    return [LEVELS.index(level) for level in levels]


def test_it_starts_at_level_1_and_frames_of_two_mebibytes() -> None:
    assert CompressionController().choice == Choice(1, 2 * MIB)


def test_a_gigabit_link_and_two_packers_are_worth_level_3_and_larger_frames() -> None:
    controller = CompressionController()
    levels = run(controller, Path(link=GBIT), 60)
    assert set(levels[5:]) == {3}
    assert controller.choice.frame_bytes > MIB


def test_a_slow_link_is_worth_the_strongest_level_and_the_largest_frames() -> None:
    controller = CompressionController()
    levels = run(controller, Path(link=GBIT / 50), 60)
    assert set(levels[8:]) == {9}
    assert controller.choice.frame_bytes == 4 * MIB


def test_a_link_faster_than_busy_cores_turns_compression_off_or_nearly() -> None:
    levels = run(CompressionController(), Path(link=80 * GBIT), 60)
    assert set(levels[5:]) <= {None, -20}


@pytest.mark.parametrize("core", [0.3, 1.0])
def test_a_slow_receiver_does_not_raise_the_level(core: float) -> None:
    levels = run(CompressionController(), Path(link=10 * GBIT, receiver=0.2e9, core=core), 60)
    assert max(rungs(levels)) <= LEVELS.index(1)


def test_a_slow_source_changes_nothing() -> None:
    assert set(run(CompressionController(), Path(link=80 * GBIT, source=0.1e9), 60)) == {1}


def test_packing_never_stays_the_bottleneck_where_a_faster_level_would_do() -> None:
    for link in (GBIT / 10, GBIT, 3 * GBIT, 10 * GBIT, 40 * GBIT):
        for core in (0.3, 1.0):
            path = Path(link=link, core=core)
            controller = CompressionController()
            run(controller, path, 60)
            seen = path.interval(controller.choice)
            assert controller.choice.level is None or seen.packing_s / seen.wall_s / seen.packers < 0.93


@pytest.mark.parametrize("link", [GBIT / 10, GBIT, 2 * GBIT, 4 * GBIT, 10 * GBIT, 25 * GBIT])
@pytest.mark.parametrize("core", [0.3, 0.6, 1.0])
def test_on_a_steady_path_it_comes_to_rest(link: float, core: float) -> None:
    levels = run(CompressionController(), Path(link=link, core=core), 400)
    changes = sum(now != before for before, now in pairwise(levels[200:]))
    # A rung that proved too much may be tried again, once in a long while.
    assert changes <= 6


@pytest.mark.parametrize("link", [GBIT / 10, GBIT, 4 * GBIT, 10 * GBIT])
@pytest.mark.parametrize("wall_s", [0.1, 2.0])
def test_an_unsteady_path_does_not_make_it_oscillate(link: float, wall_s: float) -> None:
    chance = random.Random(1)
    controller = CompressionController()
    levels: list[int | None] = []
    for _ in range(400):
        path = Path(link=link * chance.uniform(0.8, 1.2), core=chance.uniform(0.7, 1.0))
        levels.append(controller.observe(path.interval(controller.choice, wall_s)).level)
    changes = sum(now != before for before, now in pairwise(levels[100:]))
    assert changes <= 15
    seen = rungs(levels[100:])
    assert max(seen) - min(seen) <= 2


def test_it_moves_one_rung_at_a_time() -> None:
    controller = CompressionController()
    seen = [4]
    for link in (GBIT / 50, 80 * GBIT, GBIT, GBIT / 10):
        seen += rungs(run(controller, Path(link=link), 30))
    assert max(abs(now - before) for before, now in pairwise(seen)) == 1


def test_a_change_of_the_link_is_followed_within_a_few_intervals() -> None:
    controller = CompressionController()
    assert run(controller, Path(link=80 * GBIT), 30)[-1] in (None, -20)
    assert run(controller, Path(link=GBIT / 10), 8)[-1] in (3, 5, 6, 9)
    run(controller, Path(link=GBIT / 10), 30)
    assert run(controller, Path(link=80 * GBIT), 8)[-1] in (None, -20)


def test_busy_cores_are_left_at_once() -> None:
    controller = CompressionController()
    run(controller, Path(link=GBIT / 50), 30)
    seen = Interval(
        wall_s=1, link_limited_s=0, receiver_limited_s=0, packing_s=2, packers=2, plain_bytes=MIB, stored_bytes=MIB // 2
    )
    assert (controller.choice.level, controller.observe(seen).level) == (9, 6)


def test_data_that_does_not_shrink_turns_it_off_and_is_tried_ever_more_rarely() -> None:
    levels = run(CompressionController(), Path(link=GBIT, shrinks=False), 200)
    assert levels[0] is None
    tries = [number for number, level in enumerate(levels) if level is not None]
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses == sorted(pauses)
    assert len(tries) < 12


def test_data_that_shrinks_again_is_compressed_again() -> None:
    controller = CompressionController()
    run(controller, Path(link=GBIT, shrinks=False), 20)
    assert 3 in run(controller, Path(link=GBIT), 40)


def test_while_the_link_is_not_waited_for_nothing_is_tried() -> None:
    controller = CompressionController()
    assert set(run(controller, Path(link=80 * GBIT, shrinks=False), 100)) == {None}


def test_an_interval_without_data_changes_nothing() -> None:
    controller = CompressionController()
    idle = Interval(
        wall_s=1, link_limited_s=0.9, receiver_limited_s=0, packing_s=0, packers=2, plain_bytes=0, stored_bytes=0
    )
    assert {controller.observe(idle) for _ in range(50)} == {Choice(1, 2 * MIB)}


def test_an_interval_of_no_length_is_refused() -> None:
    nothing = Interval(
        wall_s=0, link_limited_s=0, receiver_limited_s=0, packing_s=0, packers=2, plain_bytes=1, stored_bytes=1
    )
    with pytest.raises(ValueError, match="tells nothing"):
        CompressionController().observe(nothing)


def test_busy_processors_make_compression_faster_even_if_the_receiver_is_what_is_waited_for() -> None:
    controller = CompressionController()
    busy = Interval(
        wall_s=0.1,
        link_limited_s=0.0,
        receiver_limited_s=0.08,
        packing_s=0.06,
        packers=2,
        plain_bytes=40 << 20,
        stored_bytes=20 << 20,
        idle_share=0.02,
    )
    for _ in range(5):
        controller.observe(busy)
    assert controller.choice.level is None
    rested = CompressionController()
    for _ in range(5):
        rested.observe(replace(busy, idle_share=0.6))
    assert rested.choice.level == 1


def test_a_link_that_is_limited_on_purpose_never_sees_less_than_level_three() -> None:
    controller = CompressionController(link_is_scarce=True)
    assert controller.choice.level == 3
    for _ in range(20):
        controller.observe(
            Interval(
                wall_s=0.1,
                link_limited_s=0.0,
                receiver_limited_s=0.0,
                packing_s=0.2,
                packers=2,
                plain_bytes=40 << 20,
                stored_bytes=20 << 20,
                idle_share=0.0,
            )
        )
    assert controller.choice.level == 3
