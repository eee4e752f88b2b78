"""The steps that only a run to an entirely new location has: the VM is made, removed again, or kept for good."""

from __future__ import annotations

from sqlalchemy import Connection

from coordinator import exclusions
from coordinator.agents import ask
from coordinator.context import CREATE_HOME, RunContext
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, HostUnreachable, is_silent
from coordinator.model import Home, Refusal
from coordinator.new_home import look
from coordinator.records import CreatedRecord, Nothing, Record
from coordinator.steps import Step, StepFailed
from protocol.messages import CreateVm, Done, KeepCreated, RemoveCreated, VmCreated

CREATE_TIMEOUT_S = 600.0
"""Empty volumes are made in seconds; a pool on a network file system that hangs is told of after this."""
NOT_KNOWN = "forbidden"
"""Code of an agent that does not know an order: it cannot have carried one out."""


class CreateHome(Step):
    """The VM that the run goes to; with its volumes it is there before anything looks at it."""

    harmless = "what this run has made already stays as it is"
    name = CREATE_HOME
    sentence = "make the VM and its volumes in the new location"
    undo_sentence = "remove the VM and the volumes that were made for this run"

    def applies(self, context: RunContext) -> bool:
        """Only for an entirely new location."""
        return context.options.to.home is Home.HOST

    async def do(self, context: RunContext) -> CreatedRecord:
        """Of the replica's definition as it is now, with the name and the UUID that the journal has."""
        vm = context.pair.original
        found = await look(context.directory, context.pair, context.options, vm)
        refusals = (found,) if isinstance(found, Refusal) else found.refusals
        if refusals:
            first = refusals[0]
            raise StepFailed(f"{vm.name} cannot be made on {vm.host}: {first.sentence}", code=first.code)
        assert not isinstance(found, Refusal)  # it would be among them
        order = CreateVm(
            order=context.order, vm_uuid=vm.uuid, name=vm.name, definition=found.pieces, volumes=found.volumes
        )
        made = await ask(context.target, order, VmCreated, timeout_s=CREATE_TIMEOUT_S)
        await context.notice(f"made on {vm.host}: the VM {vm.name} on {', '.join(made.paths)}")
        return CreatedRecord(paths=made.paths)

    async def undo(self, context: RunContext) -> Record:
        """Exactly what was made. A host that is away keeps it, and it is said so: nobody is to take it for whole."""
        vm = context.pair.original
        try:
            await ask(
                context.target, RemoveCreated(order=context.order, vm_uuid=vm.uuid), Done, timeout_s=CREATE_TIMEOUT_S
            )
        except (HostUnreachable, AgentRefused) as error:
            if error.code == NOT_KNOWN:
                return Nothing()
            if error.code == STALE_EPOCH or not is_silent(error):
                raise
            await _leave(context, error)
        return Nothing()


async def _leave(context: RunContext, error: CoordinatorError) -> None:
    pair, vm = context.pair, context.pair.original
    entry = exclusions.Exclusion(
        vm=vm,
        targets=context.original_targets,
        why=exclusions.Why.OVERWRITTEN,
        pair=pair.name,
        run=context.run.id,
        since_s=context.clock.wall_s(),
    )

    def work(connection: Connection) -> None:
        exclusions.add(connection, entry)

    await context.store.write(work)
    await context.notice(
        f"what was made on {vm.host} cannot be removed now ({error.sentence.rstrip('.')}): its VM {vm.name} is on the "
        "exclusion list; when the host is back, remove it there with "
        f"`virsh undefine --nvram --remove-all-storage {vm.name}`"
    )


class KeepHome(Step):
    """From here on the new VM is a VM like any other."""

    harmless = "what is kept already stays so"
    name = "keep_home"
    sentence = "keep the VM that was made in the new location for good"

    def applies(self, context: RunContext) -> bool:
        """Only for an entirely new location."""
        return context.options.to.home is Home.HOST

    async def do(self, context: RunContext) -> Nothing:
        """Let its host's agent forget that it made it."""
        await ask(context.target, KeepCreated(order=context.order, vm_uuid=context.pair.original.uuid), Done)
        return Nothing()
