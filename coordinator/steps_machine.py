"""The steps about what of a VM is no disk: disks that are missing, the definition, firmware variables and TPM state.

What a step replaces is kept by the production host's agent until the run is committed or taken back.
"""

from __future__ import annotations

from sqlalchemy import Connection

from coordinator import registry
from coordinator.agents import ask
from coordinator.called_off import counts
from coordinator.context import RunContext
from coordinator.definitions import disk_element
from coordinator.errors import STALE_EPOCH, AgentRefused, HostUnreachable, is_silent
from coordinator.machine import definition_of, describe, differences, missing_disks
from coordinator.model import DiskPair, Pair
from coordinator.pair_memory import remember_pair
from coordinator.records import ConfigRecord, CreatedRecord, MissingRecord, Nothing, Record, StateRecord
from coordinator.steps import Step, StepFailed, SwitchStep, inspect
from protocol.messages import (
    ChangeDefinition,
    CreateDisk,
    DefinitionChange,
    DiskCreated,
    Done,
    KeepMachine,
    ListState,
    MachineShare,
    PlaceState,
    ReadState,
    RestoreMachine,
    Side,
    StateChunk,
    StateFile,
    StateFiles,
    WriteState,
)

MAP_MISSING = "map_missing"
CREATE_MISSING = "create_missing"
APPLY_CONFIG = "apply_config"
CARRY_STATE = "carry_state"
NOT_KNOWN = "forbidden"
"""Code of an agent that does not know an order: it cannot have carried one out."""


async def give_back(context: RunContext, share: MachineShare, what: str) -> None:
    """Let the original's agent give that share back. A host that does not answer does not keep the replica from its
    service: its agent gives it back before the next run begins."""
    order = RestoreMachine(order=context.order, vm_uuid=context.pair.original.uuid, share=share)
    try:
        await ask(context.target, order, Done)
    except (HostUnreachable, AgentRefused) as error:
        if error.code == NOT_KNOWN:
            return
        if error.code == STALE_EPOCH or not (is_silent(error) or await counts(context, error)):
            raise
        await context.notice(
            f"{what} of the original on {context.target.host} cannot be given back now ({error.sentence.rstrip('.')}): "
            "its agent does so when the next run begins, unless somebody has changed it by then"
        )


class MapMissing(Step):
    """The replica's disks that the original lacks join the pair."""

    harmless = "disks that are in the pair already are not missing"
    name = MAP_MISSING
    sentence = "take the disks that the original lacks into the pair"
    undo_sentence = "take the disks that were created for this run out of the pair"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen."""
        return context.options.create_missing

    async def do(self, context: RunContext) -> MissingRecord:
        """Look which, and write it into the registry."""
        original, replica = await inspect(context, Side.ORIGINAL), await inspect(context, Side.REPLICA)
        pair = context.pair
        missing = missing_disks(pair.disks, pair.excluded, original, replica)
        known = {disk.target for disk in original.disks}
        again = tuple(disk for disk in pair.disks if disk.original not in known)  # mapped before a crash
        await _map(context, (*pair.disks, *missing))
        return MissingRecord(disks=(*again, *missing))

    async def undo(self, context: RunContext) -> Record:
        """As before. What the agents remember of the pair follows, as far as they answer."""
        created = missing_in(context)
        if not created:  # cut short before it could say: nothing was created
            known = {disk.target for disk in (await inspect(context, Side.ORIGINAL)).disks}
            created = tuple(disk for disk in context.pair.disks if disk.original not in known)
        await _map(context, tuple(disk for disk in context.pair.disks if disk not in created))
        await remember_pair(context.directory, context.pair, context.run.id)
        return Nothing()


def missing_in(context: RunContext) -> tuple[DiskPair, ...]:
    """The disks that this run creates."""
    record = context.log.result(MAP_MISSING, MissingRecord)
    return () if record is None else record.disks


async def _map(context: RunContext, disks: tuple[DiskPair, ...]) -> None:
    def work(connection: Connection) -> Pair:
        registry.set_disks(connection, context.pair.name, context.epoch, disks)
        return registry.get_pair(connection, context.pair.name)

    context.pair = await context.store.write(work)


class CreateMissing(Step):
    """The disks themselves; the original is off, and not fenced yet: the fence then locks them as well."""

    harmless = "a disk of this run that is there stays"
    name = CREATE_MISSING
    sentence = "create the disks that the original lacks"
    undo_sentence = "remove the disks that were created for this run"

    def applies(self, context: RunContext) -> bool:
        """Only where there are any."""
        return bool(missing_in(context))

    async def do(self, context: RunContext) -> CreatedRecord:
        """Each of the size and format that the replica's has."""
        sizes = {disk.replica: disk for disk in context.survey.disks}
        definition = definition_of(await describe(context.source, context.pair.replica.uuid))
        paths: list[str] = []
        for disk in missing_in(context):
            element = disk_element(definition, disk.replica) if definition else None
            if element is None:
                raise StepFailed(
                    f"the replica on {context.source.host} has no disk {disk.replica} by its definition any more: "
                    "cancel, then plan again",
                    code="disk-gone",
                )
            order = CreateDisk(
                order=context.order,
                vm_uuid=context.pair.original.uuid,
                target=disk.original,
                format=sizes[disk.replica].source_format,
                size_bytes=sizes[disk.replica].source_size_bytes,
                element=element,
            )
            paths.append((await ask(context.target, order, DiskCreated)).path)
        await context.notice(f"created on {context.target.host}: {', '.join(paths)}")
        return CreatedRecord(paths=tuple(paths))

    async def undo(self, context: RunContext) -> Record:
        """Exactly those."""
        await give_back(context, MachineShare.DISKS, "the created disks")
        return Nothing()


class ApplyConfig(SwitchStep):
    """What a person changed of the replica's definition while it served."""

    harmless = "it is the definition of before, which is kept, that is changed"
    name = APPLY_CONFIG
    sentence = "apply to the original what differs in the replica's definition"
    undo_sentence = "give the original its old definition back"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen, and while a failure still rolls back."""
        return context.options.apply_config and not context.past_no_return

    async def do(self, context: RunContext) -> ConfigRecord:
        """Compare once more: the definitions may have changed since the plan."""
        pair = context.pair
        here, there = (
            await describe(context.target, pair.original.uuid),
            await describe(context.source, pair.replica.uuid),
        )
        if not here.definition or not there.definition:
            raise StepFailed(
                f"a definition was not told ({here.problem or there.problem}): cancel", code="no-definition"
            )
        found = differences(here, there, pair.disks, pair.excluded)
        chosen = [difference for difference in found if difference.elements]
        applied = tuple(f"{each.what}: {each.original} → {each.replica}" for each in chosen)
        if chosen:
            changes = tuple(DefinitionChange(element=element) for each in chosen for element in each.elements)
            order = ChangeDefinition(order=context.order, vm_uuid=pair.original.uuid, changes=changes)
            await ask(context.target, order, Done)
            await context.notice(f"applied to the original: {'; '.join(applied)}")
        return ConfigRecord(applied=applied)

    async def undo(self, context: RunContext) -> Record:
        """To the letter."""
        await give_back(context, MachineShare.DEFINITION, "the old definition")
        return Nothing()


class CarryState(SwitchStep):
    """Firmware variables and TPM state of the replica, which is off; they are small."""

    harmless = "what is written is written anew, the old copy is kept once"
    name = CARRY_STATE
    sentence = "carry the replica's firmware variables and TPM state to the original"
    undo_sentence = "give the original its old firmware variables and TPM state back"

    def applies(self, context: RunContext) -> bool:
        """Only where there are any, and while a failure still rolls back."""
        return context.survey.carries_state and not context.past_no_return

    async def do(self, context: RunContext) -> StateRecord:
        """Send every file, then put them all in place."""
        listed = await list_state(context, Side.REPLICA)
        for file in listed:
            await self._send(context, file)
        if listed:
            order = PlaceState(order=context.order, vm_uuid=context.pair.original.uuid, files=listed)
            await ask(context.target, order, StateFiles)
        return StateRecord(files=tuple(f"{f.kind.value}/{f.name} {f.size_bytes} {f.digest.hex()}" for f in listed))

    async def _send(self, context: RunContext, file: StateFile) -> None:
        offset = 0
        while True:
            question = ReadState(
                order=context.order,
                vm_uuid=context.pair.replica.uuid,
                kind=file.kind,
                name=file.name,
                offset_bytes=offset,
            )
            data = (await ask(context.source, question, StateChunk)).data
            if not data and offset:
                break
            order = WriteState(
                order=context.order,
                vm_uuid=context.pair.original.uuid,
                kind=file.kind,
                name=file.name,
                offset_bytes=offset,
                data=data,
            )
            await ask(context.target, order, Done)
            offset += len(data)
            if not data or offset > file.size_bytes:
                break

    async def undo(self, context: RunContext) -> Record:
        """The very files of before."""
        await give_back(context, MachineShare.STATE, "the old firmware variables and TPM state")
        return Nothing()


async def list_state(context: RunContext, side: Side) -> tuple[StateFile, ...]:
    """The state of that side's VM, which is off and fenced."""
    agent = context.target if side is Side.ORIGINAL else context.source
    vm = context.pair.original if side is Side.ORIGINAL else context.pair.replica
    return (await ask(agent, ListState(order=context.order, vm_uuid=vm.uuid), StateFiles)).files


async def prove_state(context: RunContext) -> None:
    """Insist that the original's firmware variables and TPM state are the replica's (I2). Where the replica has none of
    a kind, because it never ran, the original keeps its own.

    Raises:
        StepFailed: they are not.
    """
    if not context.survey.carries_state:
        return
    wanted = await list_state(context, Side.REPLICA)
    kinds = {file.kind for file in wanted}
    found = {file for file in await list_state(context, Side.ORIGINAL) if file.kind in kinds}
    if found != set(wanted):
        differing = sorted({f"{file.kind.value} {file.name}" for file in found ^ set(wanted)})
        raise StepFailed(
            f"the original on {context.target.host} does not have the replica's {', '.join(differing)}: it must not "
            "start; see what else writes there, then fail the pair back again",
            code="state-differs",
        )


class ForgetMachine(Step):
    """The original stays as it is."""

    harmless = "what is gone already is no error"
    name = "keep_machine"
    sentence = "drop the original's old definition, firmware variables and TPM state"

    def applies(self, context: RunContext) -> bool:
        """Only where something may have been kept."""
        return any(context.log.intended(name) for name in (CREATE_MISSING, APPLY_CONFIG, CARRY_STATE))

    async def do(self, context: RunContext) -> Nothing:
        """Drop it."""
        await ask(context.target, KeepMachine(order=context.order, vm_uuid=context.pair.original.uuid), Done)
        return Nothing()
