"""What `failback doctor` looks at: the registry, what agents hold, and what libvirt says, all asked now.

Nothing is changed by `examine`. `clean_pair` and `forget_pair` give orders, under the pair's lock and a new epoch.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509
from sqlalchemy import Connection

from coordinator import duties, exclusions, registry
from coordinator.agents import ORDER_TIMEOUT_S, QUESTION_TIMEOUT_S, Agent, AgentDirectory, ask
from coordinator.clock import Clock
from coordinator.config import Config
from coordinator.entries import EntryKind
from coordinator.errors import AgentRefused, HostUnreachable, WrongState
from coordinator.findings import Findings, Problem
from coordinator.journal import list_runs
from coordinator.model import Pair, State
from coordinator.pairlock import is_locked, lock_file, pair_lock
from coordinator.states import TABLE
from coordinator.store import Store
from coordinator.survey import survey
from coordinator.takeover import Author, note
from coordinator.upgrades import delete_pair
from protocol.messages import (
    AskHoldings,
    Cleaned,
    CleanLeftovers,
    Condition,
    Done,
    ForgetPair,
    Holdings,
    LiftFence,
    Order,
    Side,
)

CLEAN_TIMEOUT_S = 3600.0
"""A live overlay is merged into its base meanwhile: as long as the guest has written to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairHealth:
    """One pair: the registry's entry, what both agents say of its VMs, whether a process works on its run, and the ids
    of its runs."""

    pair: Pair
    findings: Findings
    active: bool
    runs: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Everything that is compared.

    Attributes:
        pairs: those that were asked about. `known`: the names of all.
        hosts: what each host's agent holds, by name.
        stale_locks: lock files of pairs that there are no more.
        owed: fences that are pending, after the agents were asked. `excluded`: the exclusion list.
        certificate_ends_s: of this coordinator's own certificate, seconds since 1970; None: not known.
    """

    pairs: tuple[PairHealth, ...]
    known: frozenset[str]
    hosts: dict[str, Holdings | Problem]
    stale_locks: tuple[Path, ...]
    certificate_ends_s: float | None
    now_s: float
    owed: tuple[duties.Duty, ...] = ()
    excluded: tuple[exclusions.Exclusion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanedHost:
    """What one agent removed, and what it left."""

    host: str
    cleaned: Cleaned


@dataclass(frozen=True, slots=True)
class Doctor:
    """One process's way to look at everything. `author`: for the journal."""

    config: Config
    store: Store
    agents: AgentDirectory
    clock: Clock
    author: Author

    async def examine(self, name: str | None = None) -> Health:
        """Ask everybody; `name`: only about that pair and its hosts."""
        every = await self.store.read(registry.list_pairs)
        asked = every if name is None else (await self._get(name),)
        hosts = {ref.host for pair in asked for ref in (pair.original, pair.replica)}
        if name is None:
            hosts |= set(self.config.hosts)
        for left in (await self.store.read(duties.owed), await self.store.read(exclusions.listed)):
            hosts |= {each.vm.host for each in left if name in (None, each.pair)}
        pairs = tuple([await self._pair(pair) for pair in asked])
        held = await holdings_of(self.agents, hosts)
        owed = await self.store.read(duties.owed)  # after that: the first contact does what is owed
        return Health(
            pairs=pairs,
            known=frozenset(pair.name for pair in every),
            hosts=held,
            owed=tuple(duty for duty in owed if name in (None, duty.pair)),
            excluded=await self.store.read(exclusions.listed),
            stale_locks=_stale_locks(self.config.state_dir, {pair.name for pair in every}) if name is None else (),
            certificate_ends_s=_ends_s(self.config.pki.certificate),
            now_s=self.clock.wall_s(),
        )

    async def _pair(self, pair: Pair) -> PairHealth:
        runs = await self.store.read(lambda connection: list_runs(connection, pair.name))
        return PairHealth(
            pair=pair,
            findings=await survey(self.agents, pair, self.clock),
            active=is_locked(self.config.state_dir, pair.name),
            runs=frozenset(run.id for run in runs),
        )

    async def clean(self, name: str) -> tuple[CleanedHost, ...]:
        """Remove what runs that are over left on the hosts of the pair; of a pair in *Ready*, its fences too.

        Raises:
            WrongState: a run is under way, or not final.
            PairBusy: a process works on it.
            HostUnreachable, AgentRefused: an agent could not do it; repeated, it goes on.
        """
        with pair_lock(self.config.state_dir, (await self._get(name)).name):
            pair = await self._taken(name, "cleaned up")
            done = []
            for side, agent, uuid in self._sides(pair):
                order = Order(pair=name, run=pair.run or "", epoch=pair.epoch)
                if pair.state is State.READY:
                    autostart = pair.original_autostart if side is Side.ORIGINAL else None
                    lift = LiftFence(order=order, vm_uuid=uuid, restore_autostart=True, autostart=autostart)
                    await _lift(agent, lift)
                request = CleanLeftovers(order=order, vm_uuid=uuid)
                cleaned = await ask(agent, request, Cleaned, timeout_s=CLEAN_TIMEOUT_S)
                done.append(CleanedHost(host=agent.host, cleaned=cleaned))
            removed = sum(len(host.cleaned.removed) for host in done)
            await self._note(pair, f"leftovers removed from both hosts: {removed}")
        return tuple(done)

    async def forget(self, name: str, *, offline: bool = False) -> tuple[CleanedHost, ...]:
        """Take the pair, with its history, out of the registry, and what belongs to it off its hosts.

        Args:
            name: the pair.
            offline: do not ask the agents: their hosts are gone.

        Raises:
            WrongState, PairBusy, HostUnreachable, AgentRefused: as `clean`; the pair is still in the registry then.
        """
        done: list[CleanedHost] = []
        with pair_lock(self.config.state_dir, (await self._get(name)).name):
            pair = await self._taken(name, "forgotten")
            owed = () if offline else await self.store.read(lambda connection: duties.owed(connection, name))
            if owed:
                raise WrongState(f"{name} cannot be forgotten: {owed[0].sentence}; do that first", pair=name)
            for _, agent, uuid in () if offline else self._sides(pair):
                request = ForgetPair(order=Order(pair=name, run="", epoch=pair.epoch), vm_uuid=uuid)
                cleaned = await ask(agent, request, Cleaned, timeout_s=CLEAN_TIMEOUT_S)
                done.append(CleanedHost(host=agent.host, cleaned=cleaned))
            await self.store.write(lambda connection: delete_pair(connection, name))
            lock_file(self.config.state_dir, name).unlink(missing_ok=True)
        return tuple(done)

    async def remove_stale_locks(self) -> tuple[Path, ...]:
        """Remove lock files of pairs that there are no more, unless somebody holds one."""
        known = {pair.name for pair in await self.store.read(registry.list_pairs)}
        stale = _stale_locks(self.config.state_dir, known)
        for path in stale:
            path.unlink(missing_ok=True)
        return stale

    async def _taken(self, name: str, what: str) -> Pair:
        pair = await self._get(name)
        if TABLE[pair.state].unfinished or pair.state is State.FAILBACK:
            raise WrongState(
                f"{name} is in {pair.state.value} and cannot be {what}: end its run first "
                f"(`failback status {name}` says how)",
                pair=name,
                state=pair.state.value,
            )

        def take(connection: Connection) -> Pair:
            registry.raise_epoch(connection, name)
            return registry.get_pair(connection, name)

        return await self.store.write(take)

    async def _note(self, pair: Pair, sentence: str) -> None:
        await self.store.write(
            lambda connection: note(connection, pair, self.author, EntryKind.NOTE, "", run="", sentence=sentence)
        )

    async def _get(self, name: str) -> Pair:
        return await self.store.read(lambda connection: registry.get_pair(connection, name))

    def _sides(self, pair: Pair) -> tuple[tuple[Side, Agent, str], ...]:
        sides = ((Side.ORIGINAL, pair.original), (Side.REPLICA, pair.replica))
        return tuple((side, self.agents.agent(ref.host), ref.uuid) for side, ref in sides)


async def holdings_of(agents: AgentDirectory, hosts: set[str]) -> dict[str, Holdings | Problem]:
    """What each of those hosts' agents holds, asked at the same time."""
    answers: dict[str, Holdings | Problem] = {}

    async def one(host: str) -> None:
        try:
            answers[host] = await ask(agents.agent(host), AskHoldings(), Holdings, timeout_s=QUESTION_TIMEOUT_S)
        except (HostUnreachable, AgentRefused) as error:
            answers[host] = Problem(code=error.code, sentence=error.sentence)

    async with trio.open_nursery() as nursery:
        for host in sorted(hosts):
            nursery.start_soon(one, host)
    return {host: answers[host] for host in sorted(answers)}


async def _lift(agent: Agent, lift: LiftFence) -> None:
    """Torn disks stay fenced, and are told again by whoever looks next."""
    try:
        await ask(agent, lift, Done, timeout_s=ORDER_TIMEOUT_S)
    except AgentRefused as error:
        if error.code != Condition.TORN.value:
            raise


def _stale_locks(state_dir: Path, known: set[str]) -> tuple[Path, ...]:
    try:
        names = sorted(path.name for path in lock_file(state_dir, "x").parent.iterdir())
    except OSError:
        return ()
    pairs = [name.removesuffix(".lock") for name in names if name.endswith(".lock")]
    return tuple(lock_file(state_dir, pair) for pair in pairs if pair not in known and not is_locked(state_dir, pair))


def _ends_s(certificate: Path) -> float | None:
    try:
        ends: datetime.datetime = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None
    return ends.timestamp()
