"""``undo --original-is-off HOST``: a person's word that the original is off, where its host cannot say so itself.

The word counts only where nobody knows better: a host that answers is believed, whatever a person said.
"""

from __future__ import annotations

from sqlalchemy import Connection

from coordinator import duties
from coordinator.agents import QUESTION_TIMEOUT_S, AgentDirectory, NamingAgent, ask
from coordinator.context import RunContext
from coordinator.duties import ORIGINAL_RUNS, Duty
from coordinator.errors import (
    AgentRefused,
    CoordinatorError,
    HostUnreachable,
    NeedsOperator,
    Refused,
    UsageError,
    is_silent,
)
from coordinator.model import Pair
from coordinator.steps import IS_OFF, ask_power, operator_needed
from protocol.messages import AskPower, PowerAnswer, Side

ORIGINAL_IS_OFF = "original_is_off"
"""Name of the note with a person's word."""


async def check_word(agents: AgentDirectory, pair: Pair, host: str) -> None:
    """Whether the word is needed and names the right host.

    Raises:
        UsageError: another host was named.
        Refused: the host answers: the original runs, or is off and needs nobody's word.
    """
    vm = pair.original
    if host != vm.host:
        raise UsageError(
            f"the production host of {pair.name} is {vm.host}, not {host}: --original-is-off names the host whose VM "
            f"{vm.name} you made sure is off",
            code="other-host",
        )
    try:
        question = AskPower(vm_uuid=vm.uuid)
        agent = NamingAgent(agents.agent(host), vm)
        answer = await ask(agent, question, PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused) as error:
        if error.code != ORIGINAL_RUNS:
            return
        raise Refused(f"{error.sentence}; nothing was changed", code=ORIGINAL_RUNS) from error
    if answer.power in IS_OFF:
        raise Refused(
            f"the agent on {host} answers and proves by itself that the original {vm.name} is off: repeat without "
            "--original-is-off",
            code="word-not-needed",
        )
    raise Refused(
        f"the agent on {host} answers that the original {vm.name} is {answer.power.value}: repeat without "
        "--original-is-off, and undo powers it off",
        code=ORIGINAL_RUNS,
    )


def duty_of(pair: Pair, actor: str, said_s: float) -> Duty:
    """What is owed from that word on."""
    return Duty(
        id=0,
        pair=pair.name,
        run=pair.run or "",
        epoch=pair.epoch,
        vm=pair.original,
        targets=tuple(disk.original for disk in pair.disks),
        actor=actor,
        said_s=said_s,
    )


def owe(connection: Connection, pair: Pair, actor: str, said_s: float) -> str:
    """Owe the fence of the pair's original; returns what the journal says of the word."""
    duty = duty_of(pair, actor, said_s)
    duties.add(connection, duty)
    return f"{actor} says that {pair.original.host} cannot be asked and the original is off: {duty.sentence}"


async def counts(context: RunContext, error: CoordinatorError) -> bool:
    """Whether a person has called the original off in this run, and its host, which answered with `error`, does not
    say that it runs."""
    if not context.log.notes(ORIGINAL_IS_OFF):
        return False
    if is_silent(error):
        return True
    try:
        return (await ask_power(context, Side.ORIGINAL)).power in IS_OFF
    except (HostUnreachable, AgentRefused) as again:
        return again.code != ORIGINAL_RUNS


async def go_on_by_word(context: RunContext, error: CoordinatorError) -> None:
    """Say that a person's word stands in for a proof.

    Raises:
        NeedsOperator: nobody gave it, or the host knows better.
    """
    host, name = context.target.host, context.pair.name
    if await counts(context, error):
        await context.notice(f"{host} cannot prove that the original is off: a person said so, and it is fenced later")
        return
    raise unproven(host, name, error) from error


def unproven(host: str, name: str, error: CoordinatorError) -> NeedsOperator:
    """The question to a person when the production host proves nothing after the point of no return."""
    return operator_needed(
        f"the replica stays off: {host} cannot prove that the original is off and fenced "
        f"({error.sentence.rstrip('.')}); bring {host} back, then `failback resume {name}`; or, only if you have made "
        f"sure yourself that the original is off and stays off, `failback undo {name} --original-is-off {host}`",
        "resume",
        "undo",
    )
