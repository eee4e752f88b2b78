"""What a run shows while the replica serves and afterwards: round, evidence, what is left, the expected downtime."""

from __future__ import annotations

from coordinator.cli import human
from coordinator.records import DiskEvidence, Prediction
from coordinator.reports import ClosingReport
from coordinator.status import SERVING, PairStatus


def evidence_rows(status: PairStatus) -> list[tuple[str, str]]:
    """Facts of a status: nothing before the first round."""
    rows: list[tuple[str, str]] = []
    if status.round is not None and status.state in SERVING:
        rows.append(("Round", str(status.round)))
    for words, targets in _by_words(status.evidence):
        rows.append(("Evidence", f"{targets}: {words}"))
    if status.prediction is not None:
        if status.state in SERVING:
            rows.append(("Left", left_words(status.prediction)))
        rows.append(("Expected", expected_words(status.prediction)))
    if status.waiting is not None:
        rows.append(("Waits", status.waiting.removeprefix("waits ")))
    return rows


def left_words(prediction: Prediction) -> str:
    """How much is to be copied, and how fast it grows."""
    words = f"about {human.size(prediction.delta_bytes)}"
    if prediction.dirty_bytes_s is not None:
        words += f"; the guest writes {human.rate(prediction.dirty_bytes_s)}"
    if prediction.copy_bytes_s:
        words += f", {human.rate(prediction.copy_bytes_s)} are copied"
    return words


def expected_words(prediction: Prediction) -> str:
    """The expected downtime with its parts; what is not measured is called a guess."""
    guest = "" if prediction.guest_seen else ", a guess"
    words = (
        f"{human.duration(prediction.total_s)} of downtime ({human.duration(prediction.guest_s)} for the guest's "
        f"shutdown{guest}, {human.duration(prediction.pass_s)} to copy)"
    )
    if prediction.whole:
        words += f"; {', '.join(prediction.whole)} read whole meanwhile"
    return words


def downtime_words(report: ClosingReport) -> str:
    """The measured downtime beside the expected one."""
    if report.downtime_s is None:
        return "none yet"
    words = human.duration(report.downtime_s)
    if report.guest_s is not None:
        words += f", {human.duration(report.guest_s)} of it for the guest's shutdown"
    if report.predicted is not None:
        expected = report.predicted
        guess = "" if expected.guest_seen else ", a guess"
        words += (
            f"; expected were {human.duration(expected.total_s)} ({human.duration(expected.guest_s)} for the guest's "
            f"shutdown{guess})"
        )
    return words


def _by_words(evidence: tuple[DiskEvidence, ...]) -> list[tuple[str, str]]:
    grouped: dict[str, list[str]] = {}
    for disk in evidence:
        why = f"; no higher rung, because {disk.why_not_higher.rstrip('.')}" if disk.why_not_higher else ""
        grouped.setdefault(f"{human.rung(disk.rung)}{why}", []).append(disk.replica)
    return [(words, ", ".join(targets)) for words, targets in grouped.items()]
