"""The product, broken on purpose, one promise at a time: the simulation must notice each."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import trio

import agent.authority
import agent.sources
import agent.sync.writing
from agent.authority import Authority
from agent.authority_record import EpochRecord, with_epoch
from agent.disk.bitmaps import Bitmap
from agent.evidence import EvidenceDesk
from agent.fences import FenceKeeper
from agent.ledger import FenceRecord, Ledger
from agent.passrun import PassRunner
from agent.sync.map_file import MapFile
from agent.tags import tag_of
from agent.virt.seam import EarlierView
from coordinator import engine, rounds, steps_switch
from coordinator.context import RunContext
from coordinator.duties import DutifulAgents
from coordinator.records import CheckpointsRecord, Nothing, PassRecord
from coordinator.steps_round import DropCheckpointsOfRound
from coordinator.steps_switch import LastPass, LiftOriginalFence
from protocol.messages import DropCheckpoints
from tests.fakes.hypervisor import FakeHypervisor
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.simulation.faults import cut, kill_agent, kill_qemu, start_original
from tests.simulation.machines import SimHypervisor, write
from tests.simulation.seams import Seams
from tests.simulation.storage import SimDisk
from tests.simulation.world import Broken, World

INTACT = Broken()
_CHECK = Authority._check
_UNPROTECT = FakeHypervisor.unprotect


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to break a promise.

    Attributes:
        name: what is broken.
        patches: where, each (owner, attribute, stand-in).
        caught_as: how the violation begins.
        faults, only: what must go wrong for it to show; see `tests.simulation.story.play`.
        triggers: faults at the event that ends with the label.
    """

    name: str
    caught_as: str
    patches: tuple[tuple[Any, str, Any], ...] = ()
    faults: int | None = 0
    only: tuple[str, ...] = ()
    triggers: tuple[tuple[str, Callable[[World], None]], ...] = ()
    broken: Broken = INTACT

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the product is broken."""
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in self.patches:
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            yield

    def prepare(self, world: World) -> None:
        """Plan its triggers."""
        for label, act in self.triggers:
            world.chaos.triggers[label] = partial(act, world)


def _no_read_back(_disk: Any, written: Any, _rehash: Any = None) -> int:
    return int(written.size_bytes)


def _never_stale(_: Authority, *__: Any, **___: Any) -> None:
    return


def _by_the_clock(self: Authority, order: Any, peer: Any, seen: Any, *, take_over: bool) -> None:
    if vars(agent.authority)["time"].time() >= seen.since_s:  # the simulated one
        _CHECK(self, order, peer, seen, take_over=take_over)


async def _no_last_pass(_: LastPass, context: RunContext) -> PassRecord:
    return rounds.done_rounds(context.log)[-1].passed


def _raised_in_memory(self: Ledger, record: EpochRecord) -> None:
    self._contents = replace(self._contents, epochs=with_epoch(self._contents.epochs, record))


def _fenced_in_memory(self: Ledger, fence: FenceRecord) -> None:
    kept = tuple(record for record in self._contents.fences if record.vm_uuid != fence.vm_uuid)
    self._contents = replace(self._contents, fences=(*kept, fence))


def _since_the_latest(ledger: Ledger, vm_uuid: str, since: Any) -> Any:
    known = {}
    for target in since:
        records = [(r, i) for r in ledger.contents.trackings for i in r.images if i.target == target]
        if records:
            record, image = records[-1]
            known[target] = EarlierView(tag=tag_of(record.view), path=image.path, identity=image.identity)
    return known, {}


async def _keeps_nothing(self: DropCheckpointsOfRound, context: RunContext) -> CheckpointsRecord:
    order = DropCheckpoints(order=context.order, vm_uuid=context.pair.replica.uuid, keep=())
    await context.source.ask(order, timeout_s=60)
    return CheckpointsRecord(kept=())


def _not_marked(self: PassRunner, _: Any) -> Any:
    async def mark(_: Any) -> None:
        return

    return mark


def _marked_in_memory(self: MapFile, groups: Any) -> None:
    for group in groups:
        self._marks[group] = 0xFF


def _all_saved(self: Seams, image: Any, image_format: str) -> Any:
    if image_format != "qcow2":
        return ()
    return tuple(Bitmap(tag, False, True) for tag in self._image(image).bitmaps)


def _lost_is_empty(self: Seams, name: str, image: Any, tag: str) -> Any:
    ranges = image.bitmaps.get(tag) or []
    return MemoryDirtyRanges(image.path.stat().st_size, ranges)


def _nothing(*_: Any, **__: Any) -> tuple[()]:
    return ()


def _no_autostart(self: SimHypervisor, uuid: str, enabled: bool) -> bool:
    return bool(self.machine.domains[uuid].autostart)


async def _left_as_it_is(_: LiftOriginalFence, __: RunContext) -> Nothing:
    return Nothing()


def _merged_away(self: FakeHypervisor, uuid: str, snapshot: str, overlays: Any) -> None:
    for overlay in overlays:
        if overlay.overlay.exists():
            shutil.copyfile(overlay.overlay, overlay.base)
    _UNPROTECT(self, uuid, snapshot, overlays)


async def _does_nothing(*_: Any) -> None:
    return


async def _not_held(_: RunContext) -> bool:
    return True


def _lose_the_second_view(world: World) -> None:
    """Written to before it and after it; then its backup job ends, and the next view is the third."""
    write(world.replica.machine, world.replica, "vda", 0, world.random.randbytes(4096))

    def lose(world: World) -> None:
        write(world.replica.machine, world.replica, "vda", 1 << 19, world.random.randbytes(4096))
        world.replica.view = None

    world.chaos.triggers["dr open_view done"] = partial(lose, world)


def _killed_after_a_write(world: World) -> None:
    write(world.replica.machine, world.replica, "vda", 0, world.random.randbytes(4096))
    kill_qemu(world)


def _start_after_a_kill(world: World) -> None:
    kill_agent("prod", world)
    world.hosts["prod"].machine.hook = False
    world.nursery.start_soon(_start_once_it_is_back, world)


async def _start_once_it_is_back(world: World) -> None:
    while not world.hosts["prod"].listening:  # noqa: ASYNC110 - virtual time
        await trio.sleep(0.01)
    start_original(world)


def _original_on(world: World) -> None:
    cut("prod", world)


VARIANTS = (
    Variant(
        name="a flush is skipped",
        caught_as="I5",
        patches=((SimDisk, "flush", lambda self: None),),
        faults=2,
        only=("the production host loses",),
    ),
    Variant(
        name="reading back is skipped",
        caught_as="I2",
        patches=((agent.sync.writing, "read_back", _no_read_back),),
        faults=2,
        only=("the next write to the original rots",),
    ),
    Variant(
        name="the epoch is not checked",
        caught_as="I6",
        patches=((Authority, "_check", _never_stale),),
        faults=3,
        only=("a stale coordinator",),
    ),
    Variant(
        name="the original starts before the last pass", caught_as="I2", patches=((LastPass, "do", _no_last_pass),)
    ),
    Variant(
        name="an epoch is acknowledged before it is durable",
        caught_as="I5",
        patches=((Ledger, "put_authority", _raised_in_memory),),
        faults=2,
        only=("the target agent is killed", "the source agent is killed"),
    ),
    Variant(
        name="what was written since another view is taken for it",
        caught_as="I2",
        patches=((agent.sources, "earlier_views", _since_the_latest),),
        triggers=(("dr has done DropCheckpoints", _lose_the_second_view),),
    ),
    Variant(
        name="a checkpoint is deleted too early",
        caught_as="6",
        patches=((DropCheckpointsOfRound, "do", _keeps_nothing),),
    ),
    Variant(
        name="fences are forgotten by an agent that starts",
        caught_as="I1",
        patches=((FenceKeeper, "restore", _nothing), (FenceKeeper, "mend", _nothing)),
        triggers=(("prod has done FenceVm", _start_after_a_kill),),
    ),
    Variant(
        name="a fence leaves autostart on",
        caught_as="I5",
        patches=((SimHypervisor, "set_autostart", _no_autostart),),
        faults=2,
        only=("the production host loses",),
    ),
    Variant(
        name="a fence is acknowledged before it is durable",
        caught_as="I5",
        patches=((Ledger, "put_fence", _fenced_in_memory),),
    ),
    Variant(
        name="the original is not torn before the first write",
        caught_as="I5",
        patches=((PassRunner, "_marker", _not_marked),),
    ),
    Variant(
        name="a disk that is written to is still said to equal a view",
        caught_as="I5",
        patches=((EvidenceDesk, "before_writing", _nothing),),
    ),
    Variant(name="the ledger is not synced", caught_as="I5", broken=Broken(ledger_not_synced=True)),
    Variant(
        name="the replica starts after the point of no return",
        caught_as="I1",
        patches=(
            (RunContext, "past_no_return", property(lambda _: False)),
            (LiftOriginalFence, "undo", _left_as_it_is),
            (steps_switch, "hold_original", _not_held),
        ),
        triggers=(("prod power_on done", _original_on),),
    ),
    Variant(
        name="the marks of digest maps are skipped", caught_as="6", patches=((MapFile, "mark", _marked_in_memory),)
    ),
    Variant(
        name="a switchover that is to be held is rolled back",
        caught_as="hold",
        patches=((engine, "OnFailure", SimpleNamespace(HOLD=None)),),
        faults=2,
        only=("the next write to the original rots", "EIO on the next", "the target agent is killed"),
    ),
    Variant(
        name="the fence that a person's word owes is forgotten",
        caught_as="I1: an original that was called off",
        patches=((DutifulAgents, "_do_duties", _does_nothing),),
    ),
    Variant(
        name="a coordinator that wakes up is obeyed though the pair was taken from it",
        caught_as="I6",
        patches=((Authority, "_check", _never_stale),),
        faults=1,
        only=("the coordinator is taken for dead",),
    ),
    Variant(
        name="an epoch counts only while the clock does not go back",
        caught_as="I6",
        patches=((Authority, "_check", _by_the_clock),),
        faults=5,
        only=("the clock of the", "a stale coordinator"),
    ),
    Variant(
        name="undo gives back an original that was written to",
        caught_as="undo",
        patches=((FakeHypervisor, "unprotect", _merged_away),),
    ),
    Variant(
        name="a lost dirty bitmap is accepted",
        caught_as="I2",
        patches=((Seams, "bitmaps_of", _all_saved), (Seams, "_dirty", _lost_is_empty)),
        triggers=(("dr request_shutdown done", _killed_after_a_write),),
    ),
)
