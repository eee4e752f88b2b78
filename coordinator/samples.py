"""Asks both agents for samples of the pair's disks, for the estimates of a plan; changes nothing."""

from __future__ import annotations

import trio

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, NamingAgent, ask
from coordinator.errors import AgentRefused, HostUnreachable, UsageError
from coordinator.findings import DiskSample, Problem
from coordinator.model import DiskPair, Pair
from protocol.messages import AskEvidence, BlockSamples, Evidence, SampleBlocks

SAMPLES = 1024
"""Of each disk: a share of 3 % is told to about 1 % by so many, in a few seconds even where every read is a seek."""
DIGEST_BYTES = 16


async def take_samples(agents: AgentDirectory, pair: Pair, *, seed: int) -> tuple[DiskSample, ...]:
    """Samples of every disk of the pair, one disk after the other: guests are served from the same storage.

    Args:
        seed: 64 bits, new for every plan, so that a second plan looks at other blocks.

    Raises:
        UsageError: our own certificates cannot be read.
    """
    source = NamingAgent(agents.agent(pair.replica.host), pair.replica)
    target = NamingAgent(agents.agent(pair.original.host), pair.original)
    known = await _map_known(target, pair)
    return tuple([await _sample(source, target, pair, disk, seed, known) for disk in pair.disks])


async def _sample(
    source: Agent, target: Agent, pair: Pair, disk: DiskPair, seed: int, known: dict[str, int]
) -> DiskSample:
    chosen = await _ask(source, SampleBlocks(vm_uuid=pair.replica.uuid, target=disk.replica, seed=seed, choose=SAMPLES))
    there: BlockSamples | Problem = Problem(code="not-asked", sentence="the replica could not be sampled")
    if isinstance(chosen, BlockSamples):
        there = await _ask(
            target,
            SampleBlocks(vm_uuid=pair.original.uuid, target=disk.original, seed=seed, offsets=chosen.offsets),
        )
    return DiskSample(
        original=disk.original,
        replica=disk.replica,
        source=chosen,
        target=there,
        map_known_bytes=known.get(disk.original, 0),
    )


async def _ask(agent: Agent, question: SampleBlocks) -> BlockSamples | Problem:
    try:
        with trio.move_on_after(QUESTION_TIMEOUT_S):
            return await ask(agent, question, BlockSamples, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused) as error:
        return Problem(code=error.code, sentence=error.sentence)
    return Problem(code="timed-out", sentence=f"the agent on {agent.host} did not answer in time")


async def _map_known(target: Agent, pair: Pair) -> dict[str, int]:
    """How much of each disk of the original its digest map knows."""
    question = AskEvidence(vm_uuid=pair.original.uuid, targets=tuple(disk.original for disk in pair.disks))
    try:
        evidence = await ask(target, question, Evidence, timeout_s=QUESTION_TIMEOUT_S)
    except UsageError:
        raise
    except (HostUnreachable, AgentRefused):
        return {}
    return {disk.target: disk.map_known_bytes for disk in evidence.disks if disk.map_seed is not None}
