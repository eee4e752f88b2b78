"""Rebuilding registry entries from what agents know, where the database was lost. Nothing is guessed: what both agents
do not agree upon, or what their evidence does not prove, is told and left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import Connection

from coordinator import journal, registry
from coordinator.agents import ask
from coordinator.context import LIFT_ORIGINAL_FENCE, SURVEY
from coordinator.entries import EntryKind, JournalEntry, Phase, RunRecord
from coordinator.errors import WrongState
from coordinator.findings import Problem
from coordinator.health import Doctor, holdings_of
from coordinator.model import Newest, OperatorCall, OriginalFlag, Pair, RunOptions, State
from coordinator.pair_memory import pair_map, refs_of, remember_pair
from coordinator.pairlock import pair_lock
from coordinator.plain import to_json
from coordinator.records import DiskSizes, SurveyRecord
from coordinator.states import TABLE
from coordinator.survey import survey
from coordinator.takeover import Author, note
from protocol.messages import (
    Condition,
    Done,
    HeldFence,
    HeldPair,
    Holdings,
    HostDescription,
    Order,
    Power,
    Side,
    TakePair,
    VmDescription,
)

STANDING = (
    "original_off",
    "fence_original",
    "protect_original",
    "tracking",
    "replica_off",
    "fence_replica",
    "protect_replica",
)
"""Steps that a run whose replica is fenced may have done, in order: undo takes each back, which is harmless where it
was never done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideEvidence:
    """What one side's agent and libvirt say. None: not known there."""

    host: str
    held: HeldPair | None
    power: Power | None
    fence: HeldFence | None
    condition: Condition | None
    view: str | None
    epoch: int
    vm: VmDescription | None = None
    facts: HostDescription | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One pair as it would be adopted. `pair`: None where it cannot be; `sentence`: why, or what is proven."""

    name: str
    original: SideEvidence | None
    replica: SideEvidence | None
    pair: Pair | None
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The state that the evidence proves, or None and why not."""

    state: State | None
    newest: Newest
    sentence: str
    call: OperatorCall | None = None


async def propose(doctor: Doctor, hosts: tuple[str, ...]) -> tuple[tuple[Proposal, ...], dict[str, Problem]]:
    """Every pair that those hosts' agents know, and what stood in the way of asking some of them. Changes nothing."""
    answers = await holdings_of(doctor.agents, set(hosts))
    told = {host: held for host, held in answers.items() if isinstance(held, Holdings)}
    silent = {host: held for host, held in answers.items() if isinstance(held, Problem)}
    # A pair of which nothing but its epoch is kept was forgotten on purpose.
    names = {known.pair for held in told.values() for known in held.pairs if known.mapping is not None}
    names |= {fence.pair for held in told.values() for fence in held.fences}
    return tuple([await _proposal(doctor, name, told) for name in sorted(names)]), silent


async def adopt(doctor: Doctor, proposal: Proposal) -> Pair:
    """Take that pair in, under an epoch above every one that was seen, and tell both agents.

    Raises:
        WrongState: it cannot be adopted, or the registry has a run of it that is under way.
        AgentRefused: an agent has seen a higher epoch meanwhile.
    """
    if proposal.pair is None:
        raise WrongState(f"{proposal.name} cannot be adopted: {proposal.sentence}", pair=proposal.name)
    pair = proposal.pair
    with pair_lock(doctor.config.state_dir, pair.name):
        # First the agents: whoever still works under a lower epoch has ended when they have answered. The registry that
        # held the pair may have been another one, which is lost: what is adopted is taken over.
        order = Order(pair=pair.name, run=pair.run or "", epoch=pair.epoch)
        for host in {pair.original.host, pair.replica.host}:
            await ask(doctor.agents.agent(host), TakePair(order=order), Done)
        failed = await remember_pair(doctor.agents, pair, pair.run or "")
        if failed:
            raise failed[0]
        again = await _proposal(doctor, pair.name, await _holdings(doctor, pair))
        now = again.pair
        if now is None or (now.state, now.newest, now.flag) != (pair.state, pair.newest, pair.flag):
            raise WrongState(f"{pair.name} changed while it was looked at ({again.sentence}): repeat", pair=pair.name)
        return await doctor.store.write(lambda connection: _write(connection, proposal, pair, doctor.author))


async def _holdings(doctor: Doctor, pair: Pair) -> dict[str, Holdings]:
    answers = await holdings_of(doctor.agents, {pair.original.host, pair.replica.host})
    return {host: held for host, held in answers.items() if isinstance(held, Holdings)}


async def _proposal(doctor: Doctor, name: str, told: dict[str, Holdings]) -> Proposal:
    known = [(host, p) for host, held in told.items() for p in held.pairs if p.pair == name and p.mapping is not None]
    sides = {p.side: (host, p) for host, p in known}
    if Side.ORIGINAL not in sides or Side.REPLICA not in sides:
        said = ", ".join(f"{host} as its {p.side.value if p.side else 'pair'}" for host, p in known) or "no host"
        sentence = f"only one side is known ({said} says what it is): name both hosts, or register it anew"
        return Proposal(name=name, original=None, replica=None, pair=None, sentence=sentence)
    mapping, other = sides[Side.ORIGINAL][1].mapping, sides[Side.REPLICA][1].mapping
    assert mapping is not None  # looked at above
    if mapping != other:
        sentence = "its two agents do not agree on which VMs and disks it is: lift its fences, then register it"
        return Proposal(name=name, original=None, replica=None, pair=None, sentence=sentence)
    original, replica, disks = refs_of(mapping)
    epoch = max(p.epoch for held in told.values() for p in held.pairs if p.pair == name)
    bare = Pair(
        name=name,
        original=original,
        replica=replica,
        disks=disks,
        excluded=mapping.excluded,
        state=State.READY,
        newest=Newest.ORIGINAL,
        flag=OriginalFlag(),
        epoch=epoch + 1,
        run=None,
    )
    assert pair_map(bare) == mapping
    evidence = await _evidence(doctor, bare, told)
    return judge(bare, *evidence)


async def _evidence(doctor: Doctor, pair: Pair, told: dict[str, Holdings]) -> tuple[SideEvidence, SideEvidence]:
    found = await survey(doctor.agents, pair, doctor.clock)

    def one(side: Side) -> SideEvidence:
        ref, seen = (pair.original, found.original) if side is Side.ORIGINAL else (pair.replica, found.replica)
        held = told.get(ref.host)
        vm = seen.vm if isinstance(seen.vm, VmDescription) and seen.vm.uuid == ref.uuid else None
        flag = next((c for c in (held.conditions if held else ()) if c.vm_uuid == ref.uuid), None)
        mine = [p for p in (held.pairs if held else ()) if p.pair == pair.name and p.side is side]
        return SideEvidence(
            host=ref.host,
            held=mine[0] if mine else None,
            power=None if vm is None else vm.power,
            fence=next((f for f in (held.fences if held else ()) if f.vm_uuid == ref.uuid), None),
            condition=None if flag is None else flag.condition,
            view=None if flag is None else flag.view,
            epoch=mine[0].epoch if mine else 0,
            vm=vm,
            facts=seen.host if isinstance(seen.host, HostDescription) else None,
        )

    return one(Side.ORIGINAL), one(Side.REPLICA)


def judge(bare: Pair, original: SideEvidence, replica: SideEvidence) -> Proposal:
    """The pair in the state that the evidence proves. A value in, a value out."""
    verdict = _verdict(bare, original, replica)
    pair = None
    if verdict.state is not None:
        # The flag of the disks counts while the fence stands; without it they were out of our hands, and only torn
        # stays torn.
        flag = OriginalFlag()
        if original.condition is Condition.TORN:
            flag = OriginalFlag(condition=Condition.TORN.value)
        elif original.condition is not None and original.fence is not None:
            flag = OriginalFlag(condition=original.condition.value, view=original.view)
        pair = replace(
            bare,
            state=verdict.state,
            newest=verdict.newest,
            flag=flag,
            operator=verdict.call,
            run=replica.fence.run if verdict.call is not None and replica.fence is not None else None,
            original_autostart=None if original.fence is None else original.fence.autostart_before,
        )
    return Proposal(name=bare.name, original=original, replica=replica, pair=pair, sentence=verdict.sentence)


def _verdict(pair: Pair, original: SideEvidence, replica: SideEvidence) -> Verdict:
    def no(sentence: str) -> Verdict:
        return Verdict(state=None, newest=Newest.ORIGINAL, sentence=sentence)

    if original.power is None or replica.power is None:
        which = pair.original if original.power is None else pair.replica
        return no(f"{which.name} on {which.host} cannot be seen: define it again under its UUID, or register anew")
    clear = (Power.RUNNING, Power.OFF)
    if original.power not in clear or replica.power not in clear:
        return no("one of its VMs is neither running nor off: let it run or power it off, then repeat")
    on, serves = original.power is Power.RUNNING, replica.power is Power.RUNNING
    if on and serves:
        return no("both VMs run: power off the one that does not hold the newest data, then repeat")
    if (serves and replica.fence is not None) or (
        on and (original.fence is not None or original.condition is Condition.TORN)
    ):
        return no("a VM that is fenced or torn runs: power it off, then repeat")
    if replica.fence is not None:
        return _switched(pair, replica.fence, original_runs=on)
    if serves:
        torn = original.condition is Condition.TORN
        fenced = "fenced" if original.fence is not None else "not fenced"
        sentence = f"the replica runs, the original is off, {fenced}{' and torn' if torn else ''}"
        return Verdict(state=State.FAILOVER, newest=Newest.REPLICA, sentence=sentence)
    if on:
        sentence = "the original runs, the replica is off and not fenced"
        return Verdict(state=State.READY, newest=Newest.ORIGINAL, sentence=sentence)
    who = (
        "the replica, for the original is torn"
        if original.condition is Condition.TORN
        else "the one with the newest data"
    )
    return no(f"both VMs are off, and no fence says which one served: start {who}, then repeat")


def _switched(pair: Pair, fence: HeldFence, *, original_runs: bool) -> Verdict:
    """The replica is off and fenced: a switchover has begun, and only undoing it is proven to be possible."""
    before = State.FAILBACK if original_runs else State.SWITCHING
    what = "the original runs" if original_runs else "the original is off"
    sentence = (
        f"the registry of the run {fence.run} was lost after the replica had been powered off and fenced; {what}. "
        f"The replica's disks are as they were then: `failback undo {pair.name}` puts it back into service"
    )
    if original_runs:
        sentence += ", and what the original has written since stays behind on its disks"
    newest = Newest.ORIGINAL if original_runs else Newest.REPLICA
    call = OperatorCall(sentence=sentence, exits=("undo",), before=before)
    return Verdict(state=State.NEEDS_OPERATOR, newest=newest, sentence=sentence, call=call)


# --- writing it down ----------------------------------------------------------------------------------------------


def _write(connection: Connection, proposal: Proposal, pair: Pair, author: Author) -> Pair:
    known = registry.find_pair(connection, pair.name)
    if known is None:
        registry.add_pair(connection, pair)
    elif TABLE[known.state].unfinished or known.state is State.FAILBACK:
        raise WrongState(
            f"{pair.name} is in {known.state.value} here: its run is taken on by `failback resume {pair.name}`",
            pair=pair.name,
        )
    else:
        pair = replace(pair, epoch=max(pair.epoch, known.epoch + 1))
        registry.change_pair(connection, pair)
    if pair.run is not None:
        if any(run.id == pair.run for run in journal.list_runs(connection, pair.name)):
            raise WrongState(
                f"{pair.name} is fenced for the run {pair.run}, which has ended here: `failback doctor {pair.name}` "
                "says what is left of it",
                pair=pair.name,
            )
        _write_run(connection, proposal, pair, author)
    sentence = f"adopted from what its agents know: {proposal.sentence}"
    note(connection, pair, author, EntryKind.STATE, pair.state.value, run=pair.run or "", sentence=sentence)
    return pair


def _write_run(connection: Connection, proposal: Proposal, pair: Pair, author: Author) -> None:
    """A run of which only what its fence says is known: enough to take it back, never to go on with it."""
    run = RunRecord(
        id=pair.run or "",
        pair=pair.name,
        options=RunOptions(),
        actor=author.actor,
        started_s=author.at_s,
        ended_s=None,
        outcome=None,
        reason="adopted: the journal was lost",
    )
    journal.create_run(connection, run)
    survey_entry = _entry(pair, author, EntryKind.INTENT, SURVEY)
    journal.append(connection, survey_entry)
    done = replace(survey_entry, kind=EntryKind.DONE, result=to_json(_survey(proposal, pair)))
    journal.append(connection, done)
    for step in (*STANDING, LIFT_ORIGINAL_FENCE):
        journal.append(connection, _entry(pair, author, EntryKind.INTENT, step))


def _survey(proposal: Proposal, pair: Pair) -> SurveyRecord:
    """What is so now; of the replica, that it was in use: it was powered off and fenced by the run."""
    original, replica = proposal.original, proposal.replica
    facts = [side.facts for side in (original, replica) if side is not None and side.facts is not None]
    return SurveyRecord(
        original_power=Power.OFF,
        replica_power=Power.RUNNING,
        original_fingerprint=facts[0].fingerprint,
        replica_fingerprint=facts[-1].fingerprint,
        bulk_port=facts[0].bulk_port,
        disks=tuple(
            DiskSizes(original=d.original, replica=d.replica, source_size_bytes=0, target_size_bytes=0)
            for d in pair.disks
        ),
    )


def _entry(pair: Pair, author: Author, kind: EntryKind, step: str) -> JournalEntry:
    return JournalEntry(
        seq=0,
        pair=pair.name,
        run=pair.run or "",
        epoch=pair.epoch,
        at_s=author.at_s,
        kind=kind,
        phase=Phase.DO,
        step=step,
        actor=author.actor,
        sentence="adopted: it may have been done",
        elapsed_s=None,
        result=None,
    )
