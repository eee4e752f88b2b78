"""Which coordinator holds a pair on its agents (I6): looked at before a run is touched, taken only at a person's word.

An agent obeys the coordinator that first showed it the highest epoch. Another one, with a copy of the database or one
of its own, is refused by the agent; here it is told so before it changes anything.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import trio
from sqlalchemy import Connection

from coordinator import registry, takeover
from coordinator.agents import QUESTION_TIMEOUT_S, AgentDirectory, ask
from coordinator.config import Config
from coordinator.entries import EntryKind
from coordinator.errors import HELD, STALE_EPOCH, AgentRefused, CoordinatorError, DatabaseError, HostUnreachable
from coordinator.model import Pair
from coordinator.store import Store
from coordinator.takeover import Author
from protocol.messages import AskAuthority, Done, Order, PairAuthority, TakePair

MACHINE_ID = Path("/etc/machine-id")
MARK_NAME = "registry.mark"


def place_of(config: Config) -> str:
    """Which registry this is, for agents: host and folder for people, then, behind a #, what tells it from a copy on
    another machine and from another one on this. It stays when the folder is moved; blocks.

    Raises:
        DatabaseError: the file that keeps it can be neither read nor made.
    """
    machine = socket.gethostname()
    with suppress(OSError):
        machine = MACHINE_ID.read_text(encoding="ascii", errors="replace").strip() or machine
    mark = hashlib.blake2b(f"{machine} {_own_mark(config.state_dir)}".encode(), digest_size=6).hexdigest()
    return f"{socket.gethostname()}:{config.state_dir.absolute()} #{mark}"


def _own_mark(state_dir: Path) -> str:
    """Random, made once and kept beside the database: whoever copies that alone has another registry."""
    path = state_dir / MARK_NAME
    beside = state_dir / f"{MARK_NAME}.{secrets.token_hex(4)}"
    try:
        with suppress(FileNotFoundError):
            return path.read_text(encoding="ascii").strip()
        with beside.open("w", encoding="ascii") as file:
            file.write(secrets.token_hex(16) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            with suppress(FileExistsError):  # another process was quicker
                os.link(beside, path)
        finally:
            beside.unlink()
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise DatabaseError(
            f"the file {path}, which tells this registry from others, cannot be read or made: {error}; make its folder "
            "writable for this user"
        ) from error


async def check_held(agents: AgentDirectory, pair: Pair, place: str) -> None:
    """Return when no agent that answers says that another coordinator holds the pair, or that an epoch is above ours.

    Agents that do not answer, or do not know the question, decide when they get an order.

    Raises:
        AgentRefused: `HELD` or `STALE_EPOCH`, with who holds it.
    """
    answers, _ = await _ask_both(agents, pair, place)
    for host, told in answers.items():
        since = datetime.fromtimestamp(told.since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whose = f"{told.holder}, run {told.run or 'not known'}, epoch {told.epoch}, since {since}"
        if not told.is_you:
            raise AgentRefused(
                f"the pair {pair.name} is held on {host} by {whose}: work with that one, or, if it is gone for good, "
                "repeat with --take-over",
                code=HELD,
                host=host,
                holder=told.holder,
                seen=told.epoch,
            )
        if told.epoch > pair.epoch:
            raise AgentRefused(
                f"this registry is behind: {host} has seen epoch {told.epoch} for {pair.name} ({whose}), the registry "
                f"says {pair.epoch}, as one does that was put back from a backup: what happened since is not in it; "
                "repeat with --take-over to go on from here all the same",
                code=STALE_EPOCH,
                host=host,
                holder=told.holder,
                seen=told.epoch,
            )


async def take_pair(agents: AgentDirectory, store: Store, pair: Pair, place: str, author: Author) -> str:
    """See `coordinator.runs.Coordinator.take_pair`."""
    answers, failures = await _ask_both(agents, pair, place)
    if not answers:
        raise next(iter(failures.values()))
    above = max(told.epoch for told in answers.values())
    holders = sorted({told.holder for told in answers.values() if not told.is_you})
    whose = f"from {' and '.join(holders)}" if holders else "where no other coordinator held it"

    def raise_above(connection: Connection) -> Pair:
        registry.raise_epoch(connection, pair.name, above=above)
        raised = registry.get_pair(connection, pair.name)
        takeover.note(connection, raised, author, EntryKind.NOTE, "", sentence=f"taken over {whose} (--take-over)")
        return raised

    raised = await store.write(raise_above)
    order = Order(pair=pair.name, run=pair.run or "", epoch=raised.epoch, place=place)
    for host in answers:
        await ask(agents.agent(host), TakePair(order=order), Done)
    sentence = f"{pair.name} is taken over {whose}, under epoch {raised.epoch}"
    if failures:
        sentence += f"; not on {', '.join(failures)}, which does not answer: repeat --take-over when it does"
    return sentence


async def _ask_both(
    agents: AgentDirectory, pair: Pair, place: str
) -> tuple[dict[str, PairAuthority], dict[str, CoordinatorError]]:
    """What each host's agent says, and why it says nothing."""
    answers: dict[str, PairAuthority] = {}
    failures: dict[str, CoordinatorError] = {}

    async def one(host: str) -> None:
        question = AskAuthority(pair=pair.name, place=place)
        try:
            answers[host] = await ask(agents.agent(host), question, PairAuthority, timeout_s=QUESTION_TIMEOUT_S)
        except (HostUnreachable, AgentRefused) as error:
            failures[host] = error

    async with trio.open_nursery() as nursery:
        for host in dict.fromkeys((pair.original.host, pair.replica.host)):
            nursery.start_soon(one, host)
    return answers, failures
