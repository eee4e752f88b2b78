"""One seed from beginning to end: a run under faults, and an administrator who goes on until the pair rests."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import trio

from agent.errors import HypervisorError
from agent.virt.seam import PowerState
from coordinator.errors import CoordinatorError
from coordinator.model import (
    Newest,
    OnFailure,
    Pair,
    PairRequest,
    RestorePoint,
    RunOptions,
    ShutdownPolicy,
    State,
)
from coordinator.runs import Coordinator
from coordinator.states import TABLE, allowed_verbs
from protocol.messages import Tracking
from tests.simulation.core import Chaos, Violation
from tests.simulation.faults import cut, plan, start_original
from tests.simulation.monitor import PAIR
from tests.simulation.seams import installed, run_deterministically
from tests.simulation.world import Broken, World

ATTEMPTS = 40
WITHIN_S = 100_000.0
REAL_S = 60.0
TAKEN_BACK = (State.ROLLING_BACK, State.CANCELLING, State.UNDOING)
"""What a person has asked for to be taken back, and so goes on being."""
REQUEST = PairRequest(
    name=PAIR, original_host="prod", original_vm="web", replica_host="dr", replica_vm="web", in_failover=True
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a seed ended."""

    seed: int
    log: tuple[str, ...]
    violation: str | None
    state: str
    events: int
    differs: bool = False


@dataclass(eq=False)
class Administrator:
    """Goes on with the pair, as chosen by the seed, until it rests."""

    world: World
    faults: bool
    started: bool = False
    runs_left: int = 1
    word_given: bool = False
    outcomes: list[str] = field(default_factory=list)

    @property
    def random(self) -> Random:
        """The seed's."""
        return self.world.random

    async def work(self) -> Pair:
        """Until the pair rests. Raises `Violation` where it does not (I4)."""
        world = self.world
        self.runs_left = self.random.choice((1, 1, 2))
        await self._do("register", lambda c: c.register_pair(REQUEST))
        for _ in range(ATTEMPTS):
            if world.must_take:
                await self._take()
            pair = await self._pair()
            if pair is None:
                await self._do("register", lambda c: c.register_pair(REQUEST))
                await trio.sleep(20)
                continue
            world.chaos.say(f"=== {pair.state.value}")
            if pair.state is State.FAILOVER and world.original.state is PowerState.OFF:
                world.monitor.original_is_current = False
            if pair.state is State.FAILOVER and self.word_given:
                await self._meet_again()
            if pair.state is State.READY or (
                pair.state is State.FAILOVER and self.started and not self._begins_again()
            ):
                return pair
            await self._go_on(pair)
        raise Violation(f"I4: after {ATTEMPTS} attempts the pair does not rest: {self.outcomes[-3:]}")

    async def _take(self) -> None:
        """``--take-over``, until both hosts know of it."""
        world = self.world
        await self._do("take over", lambda c: c.take_pair(PAIR))
        if "is taken over" in self.outcomes[-1] and "not on" not in self.outcomes[-1]:
            world.must_take = False
            assert world.taken is not None
            world.taken.set()

    def _begins_again(self) -> bool:
        self.runs_left -= 1
        return self.runs_left > 0

    async def _pair(self) -> Pair | None:
        with contextlib.suppress(CoordinatorError):
            return await self.world.coordinate(lambda c: c.get_pair(PAIR))
        return None

    async def _go_on(self, pair: Pair) -> None:
        world = self.world
        verb = self._choose(pair)
        asked_back = (
            verb in ("undo", "cancel") or (pair.state if pair.operator is None else pair.operator.before) in TAKEN_BACK
        )
        world.monitor.forward_only = world.monitor.holds and not asked_back
        match verb:
            case "register":
                done = await self._do(verb, lambda c: c.register_pair(REQUEST))
            case "start":
                options = self._options()
                done = await self._do(verb, lambda c: c.start_run(PAIR, options))
                world.monitor.holds = options.on_failure is OnFailure.HOLD
                self.started = True
            case "commit":
                point = RestorePoint.KEEP if self.random.random() < 0.5 else RestorePoint.DROP
                done = await self._do(verb, lambda c: c.commit(PAIR, point, wait_audit=True))
            case "undo" if pair.operator is not None and "--original-is-off" in pair.operator.sentence:
                done = await self._undo_by_word()
            case "undo":
                if self.random.random() < 0.3:
                    cut("prod", world, 600.0)
                done = await self._do(verb, lambda c: c.undo(PAIR))
            case "cancel":
                done = await self._do(verb, lambda c: c.cancel(PAIR))
            case _:
                done = await self._do(verb, lambda c: c.resume(PAIR))
        await trio.sleep(self.random.random() * (20 if done else 5))

    async def _undo_by_word(self) -> bool:
        """The administrator makes sure that the original is off, which its host cannot say."""
        world = self.world
        if world.original.state is not PowerState.OFF:
            world.chaos.say("=== the original is made sure to be off by hand")
            world.original.end()
        cut("prod", world, 1800.0)
        self.word_given = world.monitor.called_off = True
        return await self._do("undo by word", lambda c: c.undo(PAIR, original_is_off="prod"))

    async def _meet_again(self) -> None:
        """The host of an original that was called off can be reached again: at the first contact it is fenced."""
        world, self.word_given = self.world, False
        world.monitor.called_off = False
        world.links["prod"].mend()
        if self.random.random() < 0.3:
            start_original(world)
        for _ in range(10):
            await trio.sleep(30)
            await self._do("contact", lambda c: c.findings(PAIR))
            if world.monitor.durable_fence(world.original.machine, world.original.uuid):
                return
        raise Violation("I1: an original that was called off is not fenced at the first contact with its host")

    def _choose(self, pair: Pair) -> str:
        verbs = {verb.value for verb in allowed_verbs(pair)} & {"resume", "cancel", "commit", "undo"}
        if pair.state is State.FAILOVER:
            return "start"
        if pair.state is State.FAILBACK:
            if self.outcomes and "audit" in self.outcomes[-1] and self.random.random() < 0.7:
                return "undo"
            return self.random.choice(("commit", "commit", "undo"))
        if not TABLE[pair.state].unfinished or not verbs:
            return "register"
        if "cancel" in verbs and self.outcomes[-1].startswith("resume") and self.random.random() < 0.25:
            return "cancel"
        if pair.state is State.NEEDS_OPERATOR:
            return self.random.choice(sorted(verbs))
        return "resume"

    def _options(self) -> RunOptions:
        random = self.random
        return RunOptions(
            power_off_original=True,
            shutdown_timeout_s=30.0,
            kill_after_s=5.0,
            shutdown_policy=ShutdownPolicy.FORCE if random.random() < 0.7 else ShutdownPolicy.ABORT,
            background_s=5.0,
            protect_original=random.random() < 0.25,
            on_failure=OnFailure.HOLD if random.random() < 0.3 else OnFailure.ROLLBACK,
            track=Tracking.BITMAP if random.random() < 0.8 else Tracking.NONE,
            verify_full=random.random() < 0.15,
            audit=self.world.lies or random.random() < 0.8,
        )

    async def _do(self, what: str, act: Callable[[Coordinator], Awaitable[Any]]) -> bool:
        world = self.world
        world.chaos.say(f"=== {what}")
        try:
            with trio.fail_after(3600):
                result = await world.coordinate(act)
        except trio.TooSlowError:
            raise Violation(f"I4: `{what}` neither ends nor fails within an hour") from None
        except CoordinatorError as error:
            said = f"{error.code}: {world.anonymous(error.sentence)}"
        else:
            said = "killed" if result is None else getattr(result, "sentence", world.anonymous(str(result))[:60])
            said = world.anonymous(said)
        world.chaos.say(f"=== {what}: {said}")
        self.outcomes.append(f"{what}: {said}")
        await self._cure()
        return said != "killed"

    async def _cure(self) -> None:
        """What sentences ask for: VMs started by hand are powered off, a replica that died is started again."""
        world = self.world
        for domain in (world.original, world.replica):
            if (
                domain.state is PowerState.RUNNING
                and domain is world.original
                and domain.started_by in ("hand", "boot")
            ):
                world.chaos.say("=== the original is powered off by hand")
                domain.end()
        serving = not world.monitor.original_is_current and not world.monitor.fenced.get(world.replica.uuid, False)
        if (
            serving
            and world.replica.state is PowerState.OFF
            and world.hosts["dr"].powered
            and self.random.random() < 0.5
        ):
            with contextlib.suppress(HypervisorError):
                world.replica.begin("hand")
                world.replica.started_by = "tool"


def check_rest(world: World, pair: Pair) -> None:
    """The newest data exist in full on the side that the tool names."""
    monitor = world.monitor
    if pair.state is State.READY:
        if monitor.differs:
            raise Violation("I2: what the audit had to find was committed")
        if pair.newest is not Newest.ORIGINAL or not monitor.original_is_current:
            raise Violation("I4: Ready, and the original is not what is newest")
        _require(world, world.original, "the committed original")
        if monitor.durable_fence(world.replica.machine, world.replica.uuid):
            raise Violation("I4: committed, and the replica is still fenced")
        if world.replica.state is not PowerState.OFF:
            raise Violation("I1: committed, and the replica runs")
        return
    if pair.newest is not Newest.REPLICA or monitor.original_is_current:
        raise Violation("I4: Failover, and the replica is not what is newest")
    _require(world, world.replica, "the serving replica")
    if monitor.durable_fence(world.replica.machine, world.replica.uuid):
        raise Violation("I4: Failover, and the replica is fenced")
    torn = monitor._condition(world.original) == "torn"
    if torn and not monitor.durable_fence(world.original.machine, world.original.uuid):
        raise Violation("I2: a torn original is not fenced")


def _require(world: World, domain: Any, which: str) -> None:
    for target, top in domain.disks.items():
        if domain.machine.storage.content(top.path) != bytes(domain.memory.expected[target]):
            raise Violation(f"I4: {which} does not hold what its guest wrote to {target}")


async def _play(world: World, faults: int | None, only: tuple[str, ...]) -> Pair:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(WITHIN_S):
            await world.start(nursery)
            world.chaos.planned = plan(world, faults, only)
            pair = await Administrator(world, faults != 0).work()
        world.chaos.planned = []
        for link in world.links.values():
            link.mend()
        await trio.sleep(120)  # everything that was down is up again
        check_rest(world, pair)
        nursery.cancel_scope.cancel()
    return pair


def play(
    seed: int,
    *,
    faults: int | None = None,
    only: tuple[str, ...] = (),
    echo: bool = False,
    broken: Broken | None = None,
    prepare: Callable[[World], None] | None = None,
) -> Result:
    """Play one seed. `faults`: how many; None: as the seed says; `only`: those whose name begins so.
    `prepare` is called with the world before anything runs."""
    chaos = Chaos(Random(seed), echo=echo)
    with _folder() as folder:
        world = World(folder, seed, chaos, broken or Broken())
        violation: str | None = None
        state = ""
        try:
            with installed(world), _bounded():
                if prepare is not None:
                    prepare(world)
                state = run_deterministically(seed, partial(_play, world, faults, only)).state.value
        except BaseException as error:
            found = list(_violations(error))
            if not found:
                raise
            violation = str(found[0])
        finally:
            world.close()
        return Result(
            seed=seed,
            log=tuple(chaos.log),
            violation=violation,
            state=state,
            events=chaos.count,
            differs=world.monitor.differs,
        )


def _violations(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _violations(inner)
    elif isinstance(error, Violation | trio.TooSlowError):
        yield error


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """A world that stands still in virtual time and never ends in real time is a failure too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise Violation(f"it does not end within {REAL_S:.0f} s of real time")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, REAL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="sim-", dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
