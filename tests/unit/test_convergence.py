"""Whether another pass is worth it, by values: it ends in ready or in a hold that says what can be done, always."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.convergence import MOST_IN_A_ROW, Decision, Next, Situation, decide
from coordinator.prediction import Measured, pass_seconds
from coordinator.records import PassRecord, Prediction, ViewRecord
from coordinator.rounds import DoneRound
from protocol.messages import DiskReport, PassReport

MIB = 1 << 20


def measured(*, copy: float, dirty: float | None, tracked: bool = True, read: float = 400.0 * MIB) -> Measured:
    return Measured(
        copy_bytes_s=copy,
        read_bytes_s=read,
        pass_s=0.3,
        dirty_bytes_s={} if dirty is None else {"vda": dirty},
        since_s={"vda": 1.0},
        whole_bytes={"vda": 8 << 30},
        tracked=frozenset({"vda"} if tracked else ()),
    )


def prediction(known: Measured, delta: float) -> Prediction:
    whole = () if known.tracked else ("vda",)
    return Prediction(
        guest_s=5.0,
        guest_seen=True,
        fixed_s=1.0,
        fixed_measured=True,
        pass_s=pass_seconds(known, delta=delta, whole=whole),
        delta_bytes=round(delta),
        read_bytes=0,
        whole=whole,
        dirty_bytes_s=known.dirty_bytes_s.get("vda"),
        copy_bytes_s=known.copy_bytes_s,
    )


def a_round(elapsed_s: float = 1.0, *, changed: int = 0, compared: int = 1 << 30) -> DoneRound:
    report = DiskReport(
        target="vda", size_bytes=8 << 30, zero_bytes=0, compared_bytes=compared, changed_bytes=changed, wire_bytes=0,
        written_bytes=0, zeroed_bytes=0, verified_bytes=0, rung="digests", why_not_higher="", past_cache=True,
        frames={}, stored_bytes=0, lanes=1, superblock_bytes=0, detail_bytes=0, access="",
    )  # fmt: skip
    both = PassReport(view="r1-1", elapsed_s=elapsed_s, disks=(report,))
    return DoneRound(
        number=1,
        epoch=1,
        view=ViewRecord(view="r1-1", live=True),
        passed=PassRecord(view="r1-1", source=both, target=both),
        targets=frozenset({"vda"}),
    )


def after(
    known: Measured,
    delta: float,
    *,
    rounds: int = 2,
    earlier: tuple[float, ...] = (),
    agreed_s: float | None = None,
    last: DoneRound | None = None,
) -> Decision:
    return decide(
        Situation(
            rounds=(last or a_round(),) * rounds,
            measured=known,
            prediction=prediction(known, delta),
            earlier_s=earlier,
            max_downtime_s=agreed_s,
            pair="web",
        )
    )


def test_a_tracked_disk_gets_a_second_pass_to_learn_how_fast_the_guest_writes() -> None:
    assert after(measured(copy=100 * MIB, dirty=None), 0, rounds=1).key == "measuring"


def test_what_cannot_be_measured_ends_the_measuring() -> None:
    assert after(measured(copy=100 * MIB, dirty=None), 0, rounds=3).next is Next.READY


def test_an_untracked_disk_is_read_again_only_after_a_first_pass_that_copied_much() -> None:
    known = measured(copy=100 * MIB, dirty=None, tracked=False)
    assert after(known, 0, rounds=1, last=a_round(120.0, changed=1 << 29)).next is Next.AGAIN
    assert after(known, 0, rounds=1, last=a_round(120.0, changed=1 << 20)).next is Next.READY
    assert after(known, 0, rounds=1, last=a_round(2.0, changed=1 << 29)).next is Next.READY


def test_a_large_delta_shrinks_with_another_pass_and_a_small_one_is_ready() -> None:
    known = measured(copy=100 * MIB, dirty=10 * MIB)
    assert after(known, 2000 * MIB).next is Next.AGAIN
    assert after(known, 20 * MIB).next is Next.READY


def test_a_pass_that_won_nothing_is_the_last_one() -> None:
    known = measured(copy=100 * MIB, dirty=10 * MIB)
    total_s = prediction(known, 2000 * MIB).total_s
    assert after(known, 2000 * MIB, earlier=(total_s, total_s)).next is Next.READY


def test_a_guest_that_writes_faster_than_is_copied_is_told_with_numbers_and_ways_out() -> None:
    decision = after(measured(copy=50 * MIB, dirty=80 * MIB), 500 * MIB)
    assert (decision.next, decision.key) == (Next.HOLD, "diverges")
    for words in ("80.0 MiB/s", "50.0 MiB/s", "failback limit web", "--max-downtime", "failback switch web"):
        assert words in decision.sentence


def test_a_guest_that_writes_fast_may_be_switched_within_what_was_agreed() -> None:
    assert after(measured(copy=50 * MIB, dirty=80 * MIB), 100 * MIB, agreed_s=30.0).next is Next.READY


def test_more_downtime_than_was_agreed_holds_and_names_what_is_read_whole() -> None:
    decision = after(measured(copy=100 * MIB, dirty=MIB, tracked=False), MIB, agreed_s=10.0)
    assert (decision.next, decision.key) == (Next.HOLD, "over-max")
    assert "vda whole" in decision.sentence
    assert after(measured(copy=100 * MIB, dirty=MIB, tracked=False), MIB, agreed_s=60.0).next is Next.READY


@given(
    copy=st.floats(0.1 * MIB, 5000 * MIB),
    dirty=st.floats(0, 5000 * MIB),
    first=st.floats(0, 1e12),
    tracked=st.booleans(),
    agreed_s=st.none() | st.floats(0.1, 1e5),
)
def test_no_guest_makes_passes_go_on_for_ever(
    copy: float, dirty: float, first: float, tracked: bool, agreed_s: float | None
) -> None:
    known = measured(copy=copy, dirty=dirty, tracked=tracked)
    earlier: list[float] = []
    delta = first
    for rounds in range(1, MOST_IN_A_ROW + 2):
        decision = after(known, delta, rounds=rounds, earlier=tuple(earlier), agreed_s=agreed_s)
        if decision.next is not Next.AGAIN:
            break
        earlier.append(prediction(known, delta).total_s)
        delta = dirty * prediction(known, delta).pass_s
    assert decision.next in (Next.READY, Next.HOLD)
    assert rounds <= MOST_IN_A_ROW
