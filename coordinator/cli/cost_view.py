"""What a plan will cost, for people: bytes, seconds, downtime and room, with how sure each of them is."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from coordinator.cli import human
from coordinator.cli.output import Output, table
from coordinator.model import DiskEstimate, Interval, Plan


def show_costs(output: Output, plan: Plan) -> None:
    """The estimates, where disks were sampled, and the room on each host."""
    estimate = plan.estimate
    if estimate is not None and estimate.disks:
        output.say()
        for rows in cost_tables(plan):
            output.show(rows)
        for disk in estimate.disks:
            if disk.why_not:
                output.say(f"Not estimated for {disk.original}: {disk.why_not.rstrip('.')}.")
        if any(disk.last_rung for disk in estimate.disks):
            downtime = estimate.downtime_s
            told = "not estimated" if downtime is None else f"about {human.duration(downtime)}"
            output.say(f"First pass: {_seconds(estimate.first_pass_s)}, while the replica serves.")
            output.say(f"Downtime: {told}; {estimate.sentence}.")
        else:
            output.say(f"The only pass: {_seconds(estimate.first_pass_s)}; the replica is off, so nobody is served.")
    for room in plan.rooms:
        free = "free room not told" if room.free_bytes is None else f"{human.size(room.free_bytes)} free"
        output.say(f"Room on {room.host} in {room.place}: {human.size(room.needed_bytes)} for {room.purpose}, {free}.")


def cost_tables(plan: Plan) -> Iterator[Table]:
    """A line for each disk; nothing where no disk was sampled."""
    if plan.estimate is None:
        return
    rows = table("Disk", "To read", "Differs", "First pass", "Last pass", right=("To read", "First pass"))
    for disk in plan.estimate.disks:
        rows.add_row(*_row(disk))
    yield rows


def _row(disk: DiskEstimate) -> tuple[str, str, str, str, str]:
    last = human.rung_name(disk.last_rung) or "-"
    if disk.why_not:
        return disk.original, "-", "not estimated", "-", last
    changed = disk.changed_bytes
    told = "-" if changed is None else f"{human.size(changed.likely)} ({_span(changed)})"
    return (
        disk.original,
        human.size(disk.source_read_bytes + disk.target_read_bytes),
        told,
        _seconds(disk.first_pass_s),
        last if not disk.last_pass_s else f"{last}, {human.duration(disk.last_pass_s)}",
    )


def _span(interval: Interval) -> str:
    return _from_to(human.size(interval.low), human.size(interval.high))


def _seconds(interval: Interval | None) -> str:
    if interval is None:
        return "not estimated"
    return _from_to(human.duration(interval.low), human.duration(interval.high))


def _from_to(low: str, high: str) -> str:
    """``20.6 to 31.3 MiB``: the unit once where it is the same; ``3 min 05 s to 4 min 10 s`` as it is."""
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number if high.partition(' ')[2] == unit else low} to {high}"
