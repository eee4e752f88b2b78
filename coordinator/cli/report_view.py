"""Tables for people: the plan, the state of a pair, the closing report, the journal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.text import Text

from coordinator.audit import AuditState, differences
from coordinator.cli import human
from coordinator.cli.cost_view import show_costs
from coordinator.cli.output import Output, facts, table
from coordinator.cli.run_view import bars, progress_line
from coordinator.cli.serving_view import downtime_words, evidence_rows
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.model import OriginalFlag, Pair, Plan, Refusal, RunLimits, State, VmRef
from coordinator.reports import ClosingReport, DiskLine
from coordinator.states import TABLE, allowed_verbs, ways_on
from coordinator.status import PairStatus

STATE_STYLES = {
    State.READY: "green",
    State.FAILBACK: "green",
    State.FAILOVER: "yellow",
    State.NEEDS_OPERATOR: "bold red",
}


def show_plan(output: Output, plan: Plan) -> None:
    """What would happen, on what each disk rests, and what speaks against it."""
    output.say(f"Plan for pair {plan.pair}", style="bold")
    output.say()
    for number, step in enumerate(plan.steps, start=1):
        output.item(f"{number:3}.", step)
    if plan.disks:
        output.say()
        _show_planned_disks(output, plan)
    _show_differences(output, plan)
    show_costs(output, plan)
    if plan.notes:
        output.say()
    for note in plan.notes:
        output.item("  *", note)
    show_refusals(output, plan.refusals)


def _show_planned_disks(output: Output, plan: Plan) -> None:
    """What each disk's passes are to be expected to rest on, and why on nothing higher."""
    once = not any(disk.last_rung for disk in plan.disks)
    columns = ("The pass rests on",) if once else ("First pass", "Last pass")
    disks = table("Original", "Replica", "Size", "Format", *columns, right=("Size",))
    for disk in plan.disks:
        rungs = (disk.rung,) if once else (disk.rung, disk.last_rung)
        disks.add_row(
            disk.original,
            disk.replica,
            human.size(disk.source_size_bytes),
            f"{disk.source_format} -> {disk.target_format}",
            *(human.rung_name(rung) for rung in rungs),
        )
    output.show(disks)
    for reason, targets in _by_reason((disk.why_not_higher, disk.original) for disk in plan.disks):
        output.say(f"{'The' if once else 'First'} pass of {targets}: {reason}.")
    tracked = [(d.why_last_not_higher, d.original) for d in plan.disks if d.why_last_not_higher]
    for reason, targets in _by_reason(tracked):
        output.say(f"Last pass of {targets}: {reason}.")


def _show_differences(output: Output, plan: Plan) -> None:
    """In what the two definitions differ, and what becomes of it."""
    if not plan.differences:
        return
    output.say()
    output.say("The definitions of original and replica differ:")
    rows = table("What", "Original", "Replica", "The original's")
    for each in plan.differences:
        rows.add_row(each.what, each.original, each.replica, each.action)
    output.show(rows)


def show_refusals(output: Output, refusals: Sequence[Refusal]) -> None:
    """Every reason against starting, with its code."""
    if not refusals:
        return
    output.say()
    output.say(f"Refused, {len(refusals)} reason{'s' if len(refusals) != 1 else ''}:", style="bold red")
    for refusal in refusals:
        output.item("  -", f"{refusal.sentence} [{refusal.code}]")


def show_pairs(output: Output, pairs: Sequence[Pair]) -> None:
    """Every pair in a line."""
    if not pairs:
        output.say("No pairs yet: take one in with `failback register PAIR --original HOST/VM --replica HOST/VM`.")
        return
    rows = table("Pair", "State", "Newest", "Original", "Replica", "Disks", "Original is", right=("Disks",))
    for pair in pairs:
        state = Text(pair.state.value, style=STATE_STYLES.get(pair.state, "cyan"))
        rows.add_row(
            pair.name,
            state,
            pair.newest.value,
            _original_words(pair),
            place(pair.replica),
            str(len(pair.disks)),
            flag_words(pair.flag),
        )
    output.show(rows)


def _original_words(pair: Pair) -> str:
    """The original, and what it was before where a run moves the pair."""
    if pair.former is None:
        return place(pair.original)
    pending = "" if pair.former.fenced else ", fence PENDING"
    return f"{place(pair.original)} (from {place(pair.former.vm)}{pending})"


def show_pair(output: Output, pair: Pair) -> None:
    """One pair as the registry has it."""
    mapping = ", ".join(f"{disk.original}={disk.replica}" for disk in pair.disks)
    rows = [
        ("Pair", pair.name),
        ("State", pair.state.value),
        ("Original", f"{place(pair.original)} ({pair.original.uuid})"),
        ("Replica", f"{place(pair.replica)} ({pair.replica.uuid})"),
        ("Disks", f"{mapping} (original=replica)"),
    ]
    if pair.excluded:
        rows.append(("Left out", ", ".join(pair.excluded)))
    output.show(facts(rows))


def show_status(output: Output, status: PairStatus) -> None:
    """One look at one pair."""
    pair = status.pair
    rows = [
        ("Pair", pair.name),
        ("State", f"{status.state.value}: {TABLE[status.state].means}"),
        ("Newest side", f"{status.newest.value} ({place(newest_vm(status))})"),
        ("Original", f"{place(pair.original)}, {disks_words(status.flag)}"),
        ("Replica", place(pair.replica)),
    ]
    if status.former is not None:
        rows.append(("Moved from", status.former))
    if status.run is not None:
        working = "a process works on it" if status.active else "no process works on it"
        if _unfinished(status):
            rows.append(("Run", f"{status.run}, {working}"))
        else:
            rows.append(("Last run", f"{status.run}, {human.outcome(status.outcome)}"))
            if status.outcome is not None and status.reason:
                rows.append(("Reason", status.reason))
    if status.step is not None:
        since = f", for {human.duration(max(0.0, time.time() - status.step_since_s))}" if status.step_since_s else ""
        rows.append(
            ("Step", f"{'taking back: ' if status.undoing else ''}{status.step_sentence or status.step}{since}")
        )
    if _unfinished(status) and status.limits != RunLimits():
        rows.append(("Limits", status.limits.words))
    if status.last_failure:
        rows.append(("Last failure", status.last_failure))
    rows += evidence_rows(status)
    if status.downtime_s is not None:
        rows.append(("Downtime", human.duration(status.downtime_s)))
    if status.audit.state is not AuditState.OFF:
        rows.append(("Audit", status.audit.sentence))
    if status.operator is not None:
        rows.append(("Operator", status.operator.sentence))
    rows += [("Owed", sentence) for sentence in status.owed]
    rows += [("Left behind", sentence) for sentence in status.left_behind]
    output.show(facts(rows))
    if status.progress is not None:
        output.show(bars(status.progress))
        output.say(f"    {progress_line(status.progress)}")
    output.say(f"Next: {next_words(status)}")


def next_words(status: PairStatus) -> str:
    """What may be done now."""
    pair = status.pair.name
    if status.active and _unfinished(status):
        allowed = {verb.value for verb in allowed_verbs(status.pair)}
        ways = ["watch"]
        ways += ["switch"] if status.state is State.READY_TO_SWITCH else []
        ways += ["cancel"] if "cancel" in allowed else []
        return " or ".join(f"`failback {way} {pair}`" for way in ways)
    return " or ".join(f"`failback {verb} {pair}`" for verb in ways_on(status.pair)) or "nothing"


def show_report(output: Output, report: ClosingReport) -> None:
    """What a run did: per disk, per step, and how long nobody was served."""
    output.say()
    disks = table(
        "Disk", "Pass", "Size", "Compared", "Changed", "Sent", "Verified",
        right=("Size", "Compared", "Changed", "Sent", "Verified"), title="Disks",
    )  # fmt: skip
    for line in report.disks:
        disks.add_row(
            line.original,
            human.step(line.pass_name).removesuffix(" pass").removeprefix("pass "),
            human.size(line.size_bytes),
            human.size(line.compared_bytes),
            human.size(line.changed_bytes),
            human.size(line.sent_bytes),
            human.size(line.verified_bytes),
        )
    if report.disks:
        output.show(disks)
        _show_evidence(output, report)
        output.say()
    steps = table("Step", "Took", right=("Took",), title="Steps")
    for step in report.steps:
        name = f"taken back: {step.sentence}" if step.undone else step.sentence
        failed = "" if step.outcome == "done" else f" ({step.outcome})"
        steps.add_row(f"{name}{failed}", human.duration(step.elapsed_s))
    if report.steps:
        output.show(steps)
        output.say()
    rows = [("Run", f"{report.run} ({human.outcome(report.outcome)})")]
    if report.reason:
        rows.append(("Reason", report.reason))
    sent, whole = total_sent(report), total_size(report)
    if report.disks:  # a run that ended before its first pass has nothing to say here
        rows.append(("Sent", f"{human.size(sent)} for {human.size(whole)} of disk"))
    rows.append(("Downtime", downtime_words(report)))
    for name, check in (("Verified whole", report.verify_full), ("Audit", report.audit)):
        if check is not None:
            found = differences(check) or "no difference, read whole (matched, xxh3-128)"
            rows.append((name, f"{found}, in {human.duration(check.elapsed_s)}"))
    output.show(facts(rows))


def _show_evidence(output: Output, report: ClosingReport) -> None:
    for words, where in _where_by_evidence(report.disks).items():
        output.say(f"Evidence for {where}: {words}.")
    for line in report.disks:
        output.say(f"{human.step(line.pass_name).capitalize()} of {line.original}: {_transfer(line)}.")
    if report.evidence:
        output.say(f"{report.evidence[:1].upper()}{report.evidence[1:].rstrip('.')}.")


def _where_by_evidence(lines: Sequence[DiskLine]) -> dict[str, str]:
    """By evidence: the disks that rested on it, with their passes (``vda in pass 2 and the last pass``)."""
    passes: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        name = human.step(line.pass_name)
        named = name if name[-1:].isdigit() else f"the {name}"
        passes.setdefault(_evidence(line), {}).setdefault(line.original, []).append(named)
    return {
        words: "; ".join(
            f"{targets} in {when}"
            for when, targets in _by_reason((" and ".join(names), target) for target, names in of_disk.items())
        )
        for words, of_disk in passes.items()
    }


def _evidence(line: DiskLine) -> str:
    read_back = "" if line.past_cache else "; the read-back went through the page cache"
    why = f"; no higher rung, because {line.why_not_higher.rstrip('.')}" if line.why_not_higher else ""
    return f"{human.rung(line.rung)}{why}{read_back}"


def _transfer(line: DiskLine) -> str:
    """How a disk's data travelled: what was read how, over how many connections, stored how."""
    accesses = line.source_access
    if line.target_access != accesses:
        accesses = f"{accesses} at the source, {line.target_access} at the target"
    words = f"read by {accesses}, {line.lanes} connection{'' if line.lanes == 1 else 's'}"
    if line.reconnects:
        words += f", reconnected {line.reconnects} time{'' if line.reconnects == 1 else 's'}"
    if line.resumed_bytes:
        words += f", {human.size(line.resumed_bytes)} proven by an earlier attempt"
    if not line.frames:
        return f"{words}, no data sent"
    count = sum(line.frames.values())
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(line.frames.items()))
    return (
        f"{words}, {human.size(line.changed_bytes)} in {count} frame{'' if count == 1 else 's'} ({kinds}), stored in "
        f"{human.size(line.stored_bytes)}"
    )


def total_sent(report: ClosingReport) -> int:
    """Bytes on the wire, all disks and passes."""
    return sum(line.sent_bytes for line in report.disks)


def total_size(report: ClosingReport) -> int:
    """Bytes of the disks, each counted once."""
    return sum({line.original: line.size_bytes for line in report.disks}.values())


MARKS = {
    EntryKind.INTENT: "...",
    EntryKind.DONE: "ok",
    EntryKind.FAILED: "!!",
    EntryKind.STATE: "===",
    EntryKind.NOTE: "*",
}
STYLES = {EntryKind.DONE: "green", EntryKind.FAILED: "bold red", EntryKind.STATE: "bold", EntryKind.NOTE: "yellow"}


def show_history(output: Output, entries: Sequence[JournalEntry]) -> None:
    """The journal for a person: a heading per run, a line per entry; a step's intent and its result are one line where
    nothing came between them."""
    run: str | None = None
    rows = None
    for entry in _folded(entries):
        if rows is None or entry.run != run:
            if rows is not None:
                output.show(rows)
                output.say()
            run = entry.run
            output.say(f"Run {run}" if run else "Outside a run", style="bold")
            rows = table("When", "", "What", "Took", "Who", right=("Took",))
        rows.add_row(
            human.moment(entry.at_s),
            Text(MARKS[entry.kind], style=STYLES.get(entry.kind, "dim")),
            _entry_words(entry),
            human.duration(entry.elapsed_s) if entry.elapsed_s is not None else "",
            entry.actor,
        )
    if rows is None:
        output.say("Nothing is written in the journal yet.")
    else:
        output.show(rows)


def _folded(entries: Sequence[JournalEntry]) -> Iterator[JournalEntry]:
    """The entries, but for intents that the next entry says were carried out: that one has their sentence and time."""
    intent: JournalEntry | None = None
    for entry in entries:
        if intent is not None:
            same = (entry.run, entry.step, entry.phase) == (intent.run, intent.step, intent.phase)
            if same and entry.kind is EntryKind.DONE and entry.actor == intent.actor and not entry.sentence:
                words = f"taking back: {intent.sentence}" if intent.phase is Phase.UNDO else intent.sentence
                yield replace(entry, at_s=intent.at_s, sentence=words, step="")
                intent = None
                continue
            yield intent
        intent = entry if entry.kind is EntryKind.INTENT else None
        if intent is None:
            yield entry
    if intent is not None:
        yield intent


def _entry_words(entry: JournalEntry) -> str:
    if entry.kind is EntryKind.STATE:
        return f"{entry.step}: {entry.sentence}" if entry.sentence else entry.step
    name = f"taking back {human.step(entry.step)}" if entry.phase is Phase.UNDO else human.step(entry.step)
    if not entry.step or entry.kind is EntryKind.NOTE:
        return entry.sentence or human.step(entry.step)
    if entry.kind is EntryKind.INTENT and entry.sentence:
        return f"taking back: {entry.sentence}" if entry.phase is Phase.UNDO else entry.sentence
    return f"{name}: {entry.sentence}" if entry.sentence else name


def flag_words(flag: OriginalFlag) -> str:
    """The original's flag in words."""
    return f"equals view {flag.view}" if flag.condition == "equals-view" else flag.condition


def disks_words(flag: OriginalFlag) -> str:
    """The same, said of the disks: ``disks torn``, ``disks equal view r1-2``."""
    return f"disks equal view {flag.view}" if flag.condition == "equals-view" else f"disks {flag.condition}"


def place(vm: VmRef) -> str:
    """``HOST/VM``, as on the command line."""
    return f"{vm.host}/{vm.name}"


def newest_vm(status: PairStatus) -> VmRef:
    """The VM that holds the newest data."""
    return status.pair.original if status.newest.value == "original" else status.pair.replica


def _unfinished(status: PairStatus) -> bool:
    return TABLE[status.state].unfinished


def _by_reason(reasons: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    grouped: dict[str, list[str]] = {}
    for reason, target in reasons:
        if target not in grouped.setdefault(reason, []):
            grouped[reason].append(target)
    return [(reason, ", ".join(targets)) for reason, targets in grouped.items()]
