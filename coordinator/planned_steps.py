"""The plan's steps: what a run does, in order, in sentences that the options have shaped. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.findings import Case
from coordinator.machine import carries_state
from coordinator.model import Home, OnFailure, RunOptions, ShutdownPolicy, SwitchPolicy
from coordinator.timing import LATEST_S, moment
from protocol.messages import Power, Side, Tracking


def planned_steps(case: Case) -> Iterator[str]:
    """What `start` would do with these options, a sentence each."""
    original, options, pair = case.pair.original, case.options, case.pair.name
    if options.to.home is Home.HOST:
        yield f"make the VM {original.name} on {original.host}, with a volume for each disk; nothing else is touched"
    yield "put the pair's replication on hold: the executables in hooks.d/hold, each exit code obeyed"
    if case.pair.former is not None:
        was = case.pair.former.vm
        yield f"make sure {was.name} on {was.host} is off, and fence {was.name}: the pair moves away from it"
    elif power_of(case, Side.ORIGINAL) is Power.RUNNING and options.power_off_original:
        yield f"power off the original {original.name} on {original.host}"
    if case.created:
        names = ", ".join(disk.original for disk in case.created)
        yield f"create the missing disk {names} of the original, sparse, beside its first disk (--create-missing)"
    yield f"fence the original {original.name}: its autostart off, its images locked"
    if options.protect_original:
        yield (
            f"take the working snapshot of the original {original.name}: what is written goes to overlays, its own "
            "disks stay as they are"
        )
    yield from _off(case) if is_off(case) else _serving(case)
    if options.verify_full:
        yield "read both sides' storage whole and compare, while nobody is served (--verify full)"
    if options.apply_config:
        yield "apply what differs in the replica's definition to the original's, whose old one is kept (--apply-config)"
    if carries_state(*(vm.vm for vm in case.vms())):
        yield "carry the replica's firmware variables and TPM state to the original, the old ones kept; compare them"
    if options.power_on:
        yield f"point of no return: lift the original's fence and power {original.name} on"
    else:
        yield "point of no return: lift the original's fence and leave it off (--no-power-on)"
    if options.audit:
        yield (
            "audit: read the frozen replica whole and compare it with what the original started from; this costs no "
            "downtime, and a difference forbids commit"
        )
    yield f"Failback: until `failback commit {pair}`, `failback undo {pair}` takes everything back"


def power_of(case: Case, side: Side) -> Power | None:
    """What that side's VM does; None where it was not found."""
    vm = case.vm(side)
    return None if vm is None else vm.vm.power


def is_off(case: Case) -> bool:
    """Whether the replica is off already."""
    return power_of(case, Side.REPLICA) is Power.OFF


def _off(case: Case) -> Iterator[str]:
    if case.options.switch is not SwitchPolicy.AUTO:
        yield f"Ready to switch: {_when(case.options, case.pair.name)}"
    yield f"fence the replica {case.pair.replica.name}, which is off already, and take the protective snapshot"
    yield "one pass: make the original's disks equal the replica's, and verify what was written"


def _serving(case: Case) -> Iterator[str]:
    replica, options = case.pair.replica, case.options
    frozen = ", its guest's file systems frozen for that instant (--freeze-guest)" if options.freeze_guest else ""
    yield (
        f"first pass while the replica {replica.name} on {replica.host} serves: make the original equal a frozen view "
        f"of its disks{frozen}"
    )
    yield f"more passes while each shortens the expected downtime; {_recorded(options)}"
    yield f"Ready to switch: {_when(options, case.pair.name)}{_until_then(options)}"
    yield f"switchover: shut the replica down ({_shutdown(options)}), prove it off, fence it"
    if options.track is not Tracking.NONE:
        yield "read what was recorded of the replica's last writes"
    yield "take the protective snapshot of the replica"
    yield "last pass: what the replica wrote since the pass before, and verify what was written"


def _recorded(options: RunOptions) -> str:
    match options.track:
        case Tracking.NONE:
            return "each reads the replica whole, for nothing records what it writes (--track none)"
        case Tracking.OVERLAY:
            return "what the replica writes meanwhile is recorded, by dirty bitmaps or live overlays"
        case _:
            return "what the replica writes meanwhile is recorded by dirty bitmaps, where its disks have them"


def _when(options: RunOptions, pair: str) -> str:
    """When it is switched."""
    match options.switch:
        case SwitchPolicy.AUTO:
            said = "the switchover begins at once"
        case SwitchPolicy.AT:
            when = "the set time" if options.switch_at_s is None else moment(options.switch_at_s)
            said = f"the switchover begins at {when}, or up to {LATEST_S / 60:.0f} minutes later"
        case SwitchPolicy.MANUAL:
            said = f"the switchover begins when `failback switch {pair}` says so"
        case SwitchPolicy.TURN:
            when = "" if options.switch_at_s is None else f", at {moment(options.switch_at_s)} or later"
            said = f"the switchover begins when the pairs before it in the plan are home{when}"
    return said


def _until_then(options: RunOptions) -> str:
    """What else must be, and what is done meanwhile."""
    agreed = ""
    if options.max_downtime_s is not None:
        agreed = f", if at most {options.max_downtime_s:.0f} s of downtime are expected"
    if options.switch is SwitchPolicy.AUTO and options.max_downtime_s is None:
        return ""
    return f"{agreed}; until then a pass every {options.background_s:.0f} s keeps what is left small"


def _shutdown(options: RunOptions) -> str:
    force = options.shutdown_policy is ShutdownPolicy.FORCE
    fails = "rolls back" if options.on_failure is OnFailure.ROLLBACK else "waits for you (--on-failure hold)"
    late = "it is powered off by force" if force else f"it stays on and the run {fails}"
    return f"within {options.shutdown_timeout_s:.0f} s, otherwise {late}"
