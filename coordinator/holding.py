"""``--on-failure hold``: a switchover that failed is left as it is until a person has looked."""

from __future__ import annotations

from coordinator.context import RunContext
from coordinator.errors import AgentRefused, CoordinatorError, HostUnreachable
from coordinator.model import OperatorCall
from coordinator.steps import IS_OFF, ask_power
from protocol.messages import Side


async def held(context: RunContext, error: CoordinatorError) -> OperatorCall:
    """Why the run waits, what the VMs do meanwhile, and the ways out."""
    name = context.pair.name
    replica, replica_off = await _words(context, Side.REPLICA)
    original, _ = await _words(context, Side.ORIGINAL)
    served = "so nobody is served" if replica_off else "look at both before you go on"
    sentence = (
        f"the switchover failed and is held (--on-failure hold): {error.sentence.rstrip('.')}. {replica}, {original}, "
        f"{served}. `failback resume {name}` tries again from where it stopped, `failback undo {name}` puts the "
        "replica back into service"
    )
    return OperatorCall(sentence=sentence, exits=("resume", "undo"), before=context.pair.state)


async def _words(context: RunContext, side: Side) -> tuple[str, bool]:
    """That VM in words, and whether it is off for sure."""
    host = (context.target if side is Side.ORIGINAL else context.source).host
    try:
        power = (await ask_power(context, side)).power
    except (HostUnreachable, AgentRefused):
        return f"whether the {side.value} is off is not known ({host} does not say)", False
    return f"the {side.value} on {host} is {power.value}", power in IS_OFF
