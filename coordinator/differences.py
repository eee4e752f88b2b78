"""What is not as it should be: registry, agents and libvirt compared. Values in, values out; nothing is asked here.

Each rule looks at one thing and yields a `Difference` with a sentence (what and why) and a cure (the very command).
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from coordinator.findings import Problem, SideFindings
from coordinator.health import Health, PairHealth
from coordinator.model import Pair, State, VmRef
from coordinator.states import TABLE
from protocol.messages import Condition, HeldFence, Holdings, Power, Remnant, RemnantKind, Side, VmDescription

CERTIFICATE_DAYS = 30
ROOM_BYTES = 1 << 30
"""Less than this where an agent keeps its ledger and digest maps is too little for any run."""
OFF = (Power.OFF, Power.CRASHED)


class Severity(enum.Enum):
    """How much it matters."""

    DANGER = "danger"  # data, or who serves it, is at risk
    WARNING = "warning"  # the next run will meet it, or it costs something
    NOTE = "note"  # as it should be, and good to know


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One finding. `about`: pair or host; `cure`: a command, or what a person does."""

    code: str
    severity: Severity
    about: str
    sentence: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side of a pair, as everybody sees it."""

    pair: Pair
    active: bool
    runs: frozenset[str]
    side: Side
    ref: VmRef
    found: SideFindings
    held: Holdings | None

    @property
    def title(self) -> str:
        return f"the {self.side.value} {self.ref.name} on {self.ref.host}"

    @property
    def vm(self) -> VmDescription | None:
        vm = self.found.vm
        return vm if isinstance(vm, VmDescription) and vm.uuid == self.ref.uuid else None

    @property
    def fence(self) -> HeldFence | None:
        fences = () if self.held is None else self.held.fences
        return next((f for f in fences if f.vm_uuid == self.ref.uuid), None)

    @property
    def condition(self) -> Condition | None:
        told = () if self.held is None else self.held.conditions
        return next((c.condition for c in told if c.vm_uuid == self.ref.uuid), None)

    @property
    def remnants(self) -> tuple[Remnant, ...]:
        return () if self.held is None else tuple(r for r in self.held.remnants if r.vm_uuid == self.ref.uuid)

    @property
    def rests(self) -> bool:
        """No run is under way: nothing of one may be left."""
        return not TABLE[self.pair.state].unfinished and self.pair.state is not State.FAILBACK


def differences(health: Health) -> tuple[Difference, ...]:
    """Everything, the most serious first."""
    found = [*_of_hosts(health), *_of_coordinator(health), *_left_behind(health)]
    for each in health.pairs:
        found += _of_pair(each, health)
    order = list(Severity)
    return tuple(sorted(found, key=lambda d: (order.index(d.severity), d.about, d.code)))


def _sides(each: PairHealth, health: Health) -> tuple[_Side, _Side]:
    def one(side: Side, ref: VmRef, found: SideFindings) -> _Side:
        held = health.hosts.get(ref.host)
        held = held if isinstance(held, Holdings) else None
        return _Side(pair=each.pair, active=each.active, runs=each.runs, side=side, ref=ref, found=found, held=held)

    pair, findings = each.pair, each.findings
    return (
        one(Side.ORIGINAL, pair.original, findings.original),
        one(Side.REPLICA, pair.replica, findings.replica),
    )


# --- hosts and this coordinator -----------------------------------------------------------------------------------


def _of_hosts(health: Health) -> Iterator[Difference]:
    ours = f"failback {version('failback')}"
    for host, held in health.hosts.items():
        if isinstance(held, Problem):
            yield _made(
                "agent-silent", Severity.DANGER, host, held.sentence, f"systemctl status failback-agent on {host}"
            )
            continue
        if held.software != ours:
            text = f"the agent on {host} is {held.software}, and this is {ours}"
            yield _made("version", Severity.WARNING, host, text, f"install the same version on {host}, then restart it")
        for problem in held.problems:
            text = f"the agent on {host} cannot see everything: {problem}"
            yield _made("unseen", Severity.WARNING, host, text, f"virsh list --all on {host}")
        if held.left_off:
            text = f"the agent on {host} holds {held.left_off} things more than it could tell at once"
            yield _made("left-off", Severity.WARNING, host, text, "clean up what is listed, then repeat")
        yield from _expiring(f"the agent on {host}", host, held.certificate_ends_s, health.now_s, f"pki issue {host}")
        if held.state_free_bytes < ROOM_BYTES:
            text = (
                f"only {held.state_free_bytes >> 20} MiB are free on {host} where the agent keeps its ledger and maps"
            )
            yield _made("room", Severity.WARNING, host, text, f"free some room under /var/lib/failback on {host}")
        yield from _strays(host, held, health)


def _strays(host: str, held: Holdings, health: Health) -> Iterator[Difference]:
    """What is held for pairs that the registry does not know."""
    for known in held.pairs:
        if known.pair not in health.known and known.mapping is not None:
            text = f"the agent on {host} knows a pair {known.pair} (epoch {known.epoch}), the registry does not"
            other = {known.mapping.original.host, known.mapping.replica.host}
            yield _made("unknown-pair", Severity.WARNING, host, text, f"failback adopt {' '.join(sorted(other))}")
    for fence in held.fences:
        left = any((e.vm.host, e.vm.uuid) == (host, fence.vm_uuid) for e in health.excluded)
        if fence.pair not in health.known and not left:
            text = f"{fence.vm or fence.vm_uuid} on {host} is fenced for the pair {fence.pair}, which is not registered"
            yield _made("unknown-fence", Severity.DANGER, host, text, "failback adopt with both of its hosts")
    for disk in held.disks:
        if not disk.pair and disk.map_bytes:
            text = f"a digest map of {disk.map_bytes >> 10} KiB on {host} is of disk {disk.target} of {disk.vm_uuid}, "
            text += "which no pair has"
            yield _made("old-map", Severity.NOTE, host, text, "the next --clean of a pair on that host removes it")
    if any(r.kind is RemnantKind.SOCKET for r in held.remnants):
        text = f"sockets of an earlier agent are left on {host}"
        yield _made("socket", Severity.NOTE, host, text, "the next --clean of a pair on that host removes them")


def _left_behind(health: Health) -> Iterator[Difference]:
    """What moves left behind: fences that are pending, and VMs on the exclusion list that nothing keeps off."""
    for duty in health.owed:
        cure = f"bring {duty.vm.host} back, then failback doctor {duty.pair}"
        yield _made("fence-pending", Severity.DANGER, duty.pair, duty.sentence, cure)
    pending = {(duty.vm.host, duty.vm.uuid) for duty in health.owed}
    for each in health.excluded:
        held, key = health.hosts.get(each.vm.host), (each.vm.host, each.vm.uuid)
        if not isinstance(held, Holdings) or key in pending:
            continue
        if all(fence.vm_uuid != each.vm.uuid for fence in held.fences):
            text = f"nothing keeps {each.vm.name} on {each.vm.host} off, which a run of {each.pair} left behind"
            cure = f"undefine it there, or failback readmit {each.vm.host}/{each.vm.name} if it is to be used"
            yield _made("excluded-unfenced", Severity.WARNING, each.pair, text, cure)


def _of_coordinator(health: Health) -> Iterator[Difference]:
    for path in health.stale_locks:
        text = f"the lock file {path.name} is of a pair that is not registered any more"
        yield _made("stale-lock", Severity.WARNING, "coordinator", text, "failback doctor --clean")
    if health.certificate_ends_s is not None:
        mine = "this coordinator"
        yield from _expiring(mine, "coordinator", health.certificate_ends_s, health.now_s, "pki init")


def _expiring(whose: str, about: str, ends_s: float, now_s: float, cure: str) -> Iterator[Difference]:
    days = (ends_s - now_s) / 86400
    if ends_s and days < CERTIFICATE_DAYS:
        when = "has expired" if days < 0 else f"expires in {days:.0f} days"
        severity = Severity.DANGER if days < 0 else Severity.WARNING
        text = f"the certificate of {whose} {when}: afterwards nobody can talk to it"
        yield _made("certificate", severity, about, text, f"failback {cure}, and bring it there")


# --- pairs --------------------------------------------------------------------------------------------------------


def _of_pair(each: PairHealth, health: Health) -> Iterator[Difference]:
    original, replica = _sides(each, health)
    yield from _run(each)
    yield from _power(each.pair, original, replica)
    for side in (original, replica):
        for rule in SIDE_RULES:
            yield from rule(side)


def _run(each: PairHealth) -> Iterator[Difference]:
    pair, name = each.pair, each.pair.name
    if pair.state is State.NEEDS_OPERATOR:
        sentence = pair.operator.sentence if pair.operator is not None else "only a person can go on"
        exits = pair.operator.exits if pair.operator is not None else ("resume",)
        cure = " or ".join(f"failback {verb} {name}" for verb in exits)
        yield _made("operator", Severity.DANGER, name, f"{name} needs an operator: {sentence}", cure)
    elif TABLE[pair.state].unfinished and not each.active:
        text = f"{name} is in {pair.state.value}, and no process works on its run {pair.run}"
        yield _made("orphaned-run", Severity.DANGER, name, text, f"failback resume {name}")


def _power(pair: Pair, original: _Side, replica: _Side) -> Iterator[Difference]:
    name = pair.name
    on = {side.side: side.vm is not None and side.vm.power not in OFF for side in (original, replica)}
    stop = f"virsh shutdown {shlex.quote(original.ref.name)} on {original.ref.host}"
    if on[Side.ORIGINAL] and on[Side.REPLICA]:
        text = f"both {original.title} and {replica.title} run: what they write goes apart"
        yield _made("both-running", Severity.DANGER, name, text, f"{stop}, if the replica is in use")
    elif pair.state is State.FAILOVER and on[Side.ORIGINAL]:
        text = f"{name} is in Failover, but {original.title} runs and the replica does not"
        cure = f"{stop} and start the replica; or failback forget {name}, and register it as it is"
        yield _made("original-runs", Severity.DANGER, name, text, cure)
    elif pair.state is State.READY and on[Side.REPLICA]:
        text = f"{name} is in Ready, but {replica.title} runs and the original does not"
        yield _made("replica-runs", Severity.WARNING, name, text, f"failback failover {name}, if it took over")
    elif pair.state in (State.READY, State.FAILOVER) and not any(on.values()):
        serving = original if pair.state is State.READY else replica
        if serving.vm is not None:
            text = f"neither VM of {name} runs"
            cure = f"virsh start {shlex.quote(serving.ref.name)} on {serving.ref.host}"
            yield _made("nobody-serves", Severity.WARNING, name, text, cure)


def _identity(side: _Side) -> Iterator[Difference]:
    name = side.pair.name
    if isinstance(side.found.vm, Problem):
        text = f"{side.title} cannot be inspected: {side.found.vm.sentence}"
        yield _made("vm-missing", Severity.DANGER, name, text, f"virsh list --all on {side.ref.host}")
    elif isinstance(side.found.vm, VmDescription) and side.found.vm.uuid != side.ref.uuid:
        text = f"{side.title} has another UUID ({side.found.vm.uuid}) than at registration: it was defined anew"
        cure = f"failback register {name} again, if it is the right VM"
        yield _made("uuid-changed", Severity.DANGER, name, text, cure)


def _epoch(side: _Side) -> Iterator[Difference]:
    pairs = () if side.held is None else side.held.pairs
    seen = max((p.epoch for p in pairs if p.pair == side.pair.name), default=0)
    if seen > side.pair.epoch:
        hosts = " ".join(sorted({side.pair.original.host, side.pair.replica.host}))
        text = (
            f"the agent on {side.ref.host} obeys epoch {seen} of {side.pair.name}, and this registry has "
            f"{side.pair.epoch}: another coordinator took the pair over, or this database is an old copy"
        )
        yield _made(
            "epoch-ahead", Severity.DANGER, side.pair.name, text, f"end the other one, then failback adopt {hosts}"
        )


def _fences(side: _Side) -> Iterator[Difference]:
    if side.held is None:
        return
    name, fence = side.pair.name, side.fence
    if fence is None:
        yield from _unfenced(side)
        return
    if fence.power is not None and fence.power not in OFF:
        text = f"{side.title} is fenced and runs: it was started while no agent held its images"
        yield _made("fenced-runs", Severity.DANGER, name, text, f"virsh destroy {side.ref.name} on {side.ref.host}")
    if fence.unlocked:
        text = f"{side.title} is fenced, but the image of {', '.join(fence.unlocked)} is not locked"
        cure = f"end what uses it on {side.ref.host}; the agent takes the lock by itself"
        yield _made("not-locked", Severity.DANGER, name, text, cure)
    if fence.autostart:
        text = f"{side.title} is fenced, but its autostart is on: its host would try to start it"
        cure = f"virsh autostart --disable {side.ref.name} on {side.ref.host}"
        yield _made("autostart", Severity.WARNING, name, text, cure)
    if side.rests and side.condition is not Condition.TORN:
        severity = (
            Severity.NOTE if side.side is Side.ORIGINAL and side.pair.state is State.FAILOVER else Severity.WARNING
        )
        text = f"{side.title} is fenced for the run {fence.run}, and no run of {name} is under way"
        cure = f"failback doctor {name} --clean"
        if side.pair.state is State.FAILOVER:
            cure = f"failback start {name} takes it over"
        yield _made("fence-without-run", severity, name, text, cure)


def _unfenced(side: _Side) -> Iterator[Difference]:
    name, state = side.pair.name, side.pair.state
    torn = side.condition is Condition.TORN or (
        side.side is Side.ORIGINAL and side.pair.flag.condition == Condition.TORN.value and state is not State.READY
    )
    needed = side.side is Side.REPLICA and state is State.FAILBACK
    if torn:
        text = f"{side.title} is torn (written in part, not verified) and not fenced: it must not boot"
        yield _made(
            "torn-unfenced", Severity.DANGER, name, text, f"failback start {name}, which fences and completes it"
        )
    elif needed:
        text = f"{side.title} should be fenced until commit or undo, and is not"
        yield _made("fence-missing", Severity.DANGER, name, text, f"failback resume {name}")


def _remnants(side: _Side) -> Iterator[Difference]:
    if not side.rests:
        return
    name = side.pair.name
    clean = f"failback doctor {name} --clean"
    for left in side.remnants:
        what = f"{left.kind.value} {left.name}"
        if left.kind is RemnantKind.SNAPSHOT:
            if left.recorded and side.side is Side.ORIGINAL:
                if side.pair.state is not State.FAILBACK:
                    text = f"{side.title} is under the working snapshot {left.name} of a run that is over"
                    cure = f"the next run drops it: failback start {name}"
                    yield _made("working-snapshot", Severity.NOTE, name, text, cure)
            elif left.recorded or left.name.removeprefix(f"failback-{name}-") in side.runs:
                text = f"{side.title} keeps the protective snapshot {left.name} as a restore point"
                cure = f"merge it when it is not wanted any more: virsh blockcommit on {side.ref.host}"
                yield _made("restore-point", Severity.NOTE, name, text, cure)
            else:
                text = f"{side.title} has the protective snapshot {left.name} of no run that is known here"
                cure = f"look at it: virsh snapshot-info {side.ref.name} {left.name} on {side.ref.host}"
                yield _made("snapshot", Severity.WARNING, name, text, cure)
        elif left.removable:
            text = f"a run that is over left {what} at {side.title}"
            yield _made(f"leftover-{left.kind.value}", Severity.WARNING, name, text, clean)
        else:
            text = f"{what} at {side.title} belongs to no run, and is not removed by itself, for it may hold data"
            yield _made(f"stray-{left.kind.value}", Severity.WARNING, name, text, f"look at it on {side.ref.host}")


def _passes(side: _Side) -> Iterator[Difference]:
    for held in () if side.held is None else side.held.passes:
        if held.pair == side.pair.name and held.running and not side.active:
            text = f"the agent on {side.ref.host} works on a pass of {held.pair}, and no process here asked for it"
            cure = f"failback resume {held.pair}, or another coordinator is at work"
            yield _made("pass-without-process", Severity.DANGER, side.pair.name, text, cure)


def _made(code: str, severity: Severity, about: str, sentence: str, cure: str) -> Difference:
    return Difference(code=code, severity=severity, about=about, sentence=sentence, cure=cure)


SIDE_RULES: tuple[Callable[[_Side], Iterator[Difference]], ...] = (_identity, _epoch, _fences, _remnants, _passes)
"""What is looked at on each side of a pair."""
