"""The steps that compare and write nothing: `--verify full` before the original may start, the audit after it did."""

from __future__ import annotations

from coordinator.agents import QUESTION_TIMEOUT_S, ask
from coordinator.audit import AUDIT, differences
from coordinator.checks import close_frozen, run_check
from coordinator.context import LIFT_ORIGINAL_FENCE, RunContext
from coordinator.entries import EntryKind
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, is_silent
from coordinator.model import State
from coordinator.records import CheckRecord, DigestMap, MapsRecord, Nothing, PassRecord, Record
from coordinator.steps import Step, StepFailed, prove_off, take_fence
from protocol.messages import AskEvidence, CloseView, Done, Evidence, PassKind, Side

LAST_PASS = "last_pass"
UNKNOWN_QUESTION = "forbidden"
"""Code of an agent that does not take a request (`agent.errors.Forbidden`)."""


def final_view(context: RunContext) -> str:
    """The view the original was made equal to.

    Raises:
        StepFailed: the journal has none.
    """
    final = context.log.result(LAST_PASS, PassRecord)
    if final is None:
        raise StepFailed("the journal has no complete last pass: there is nothing to compare with", code="not-verified")
    return final.view


class VerifyFull(Step):
    """Both sides' storage, read whole."""

    harmless = "it reads and compares, and changes nothing"
    name = "verify_full"
    sentence = "verify in full: read both sides' storage whole and compare"
    lasts_until = LIFT_ORIGINAL_FENCE
    of_switchover = True

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen, and while a mismatch can still roll the run back."""
        return context.options.verify_full and not context.past_no_return

    async def do(self, context: RunContext) -> CheckRecord:
        """Compare; what differs ends the switchover."""
        record = await run_check(context, self.name, final_view(context), PassKind.VERIFY)
        if record.differs:
            raise StepFailed(
                f"the original on {context.target.host} does not hold what the replica holds: {differences(record)}; "
                "look at its storage before the pair is failed back again",
                code="verify-differs",
            )
        return record


async def require_untouched(context: RunContext, view: str) -> None:
    """Insist that nobody has written to the original since the last pass, by what its agent can tell of its disks.

    The flag alone does not know: an agent that was away for a moment takes the locks again and finds the flag as it
    was. A verification in full is no reason not to ask, for it proves what the storage held while it was read; its
    agent knows the files as they were then, and says so of a block device whose lock it has held since.

    Raises:
        StepFailed: a disk is not proven to equal the view any more, or its agent does not say.
    """
    question = AskEvidence(vm_uuid=context.pair.original.uuid, targets=context.original_targets)
    try:
        disks = (await ask(context.target, question, Evidence, timeout_s=QUESTION_TIMEOUT_S)).disks
    except AgentRefused as error:
        if is_silent(error) or error.code == STALE_EPOCH:
            raise
        if error.code == UNKNOWN_QUESTION and _verified_in_full(context):
            return  # an older agent, which keeps no such records: what was read whole is all there is
        # One that will not say what its disks equal proves nothing, whatever its reason.
        raise StepFailed(
            f"the agent on {context.target.host} does not say what the original's disks hold "
            f"({error.sentence.rstrip('.')}): it must not start; mend that, or fail the pair back with --verify full",
            code="not-verified",
        ) from error
    for disk in disks:
        if disk.equals != view:
            why = disk.why_not.rstrip(".") or f"it equals {disk.equals}"
            raise StepFailed(
                f"the disk {disk.target} of the original on {context.target.host} is not proven to hold what the last "
                f"pass verified ({why}): it must not start; fail the pair back again",
                code="not-verified",
            )


def _verified_in_full(context: RunContext) -> bool:
    """Whether this process has read both storages whole in this switchover."""
    full = context.log.last(VerifyFull.name)
    switching = context.log.seq_of_state(State.SWITCHING.value)
    return full is not None and full.kind is EntryKind.DONE and full.epoch == context.epoch and full.seq > switching


class RememberMaps(Step):
    """The seeds of the original's digest maps, which stand for what it starts from."""

    harmless = "it asks and changes nothing"
    name = "remember_maps"
    sentence = "note which digest maps the audit can rely on"
    of_switchover = True

    def applies(self, context: RunContext) -> bool:
        """Only for an audit, and before the original is out of our hands."""
        return context.options.audit and not context.past_no_return

    async def do(self, context: RunContext) -> MapsRecord:
        """Ask; a map that is missing is no reason to keep people waiting: the audit will say so."""
        question = AskEvidence(vm_uuid=context.pair.original.uuid, targets=context.original_targets)
        try:
            evidence = await ask(context.target, question, Evidence, timeout_s=QUESTION_TIMEOUT_S)
        except CoordinatorError as error:
            return MapsRecord(maps=(), why_not=error.sentence)
        return MapsRecord(
            maps=tuple(
                # A map that proves nothing any more has a seed all the same, but what it stands for is another disk.
                DigestMap(
                    original=disk.target,
                    seed=disk.map_seed if disk.map_known_bytes else None,
                    why_not=disk.why_no_map,
                )
                for disk in evidence.disks
            ),
            why_not="",
        )


class Audit(Step):
    """The frozen replica, read whole, against the digest map of what the original started from."""

    harmless = "it reads and compares, and changes nothing"
    name = AUDIT
    sentence = "audit: read the frozen replica whole and compare it with what the original started from"
    undo_sentence = "close the view of the audit"
    interruptible = True

    async def do(self, context: RunContext) -> CheckRecord:
        """Compare. A difference is a result and no failure: it forbids the commit."""
        view, seeds = final_view(context), self._seeds(context)
        await prove_off(context, Side.REPLICA)
        await take_fence(context, Side.REPLICA)
        try:
            return await run_check(context, self.name, view, PassKind.AUDIT, seeds)
        finally:
            await close_frozen(context, view)

    async def undo(self, context: RunContext) -> Record:
        """Nothing of it stays."""
        close = CloseView(order=context.order, vm_uuid=context.pair.replica.uuid, view=final_view(context))
        await ask(context.source, close, Done)
        return Nothing()

    @staticmethod
    def _seeds(context: RunContext) -> dict[str, int]:
        maps = context.log.result(RememberMaps.name, MapsRecord)
        known = {} if maps is None else {one.original: one for one in maps.maps}
        seeds: dict[str, int] = {}
        for target in context.original_targets:
            found = known.get(target)
            if found is None or found.seed is None:
                why = "nothing is known of one"
                if found is not None:
                    why = found.why_not
                elif maps is not None and maps.why_not:
                    why = maps.why_not
                raise StepFailed(
                    f"the agent on {context.target.host} keeps no digest map of disk {target} as the original started "
                    f"from it ({why.rstrip('.')}): it cannot be audited",
                    code="no-map",
                )
            seeds[target] = found.seed
        return seeds


class EndAudit(Step):
    """What an audit that was broken off left open."""

    harmless = "a view that is closed already is no error"
    name = "end_audit"
    sentence = "close the view of the audit that was not completed"

    def applies(self, context: RunContext) -> bool:
        """Only after such a one."""
        return context.log.intended(AUDIT) and not context.log.is_done(AUDIT)

    async def do(self, context: RunContext) -> Nothing:
        """Close it."""
        close = CloseView(order=context.order, vm_uuid=context.pair.replica.uuid, view=final_view(context))
        await ask(context.source, close, Done)
        return Nothing()


AUDIT_STEP = Audit()
