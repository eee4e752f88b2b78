"""The way into a running agent for root on its own host: a unix socket in the runtime folder, one line each way.

An agent holds its image locks in its own process, so that only it can let go of them. Requests and answers are JSON
objects; the folder is the agent's user's alone, which is all the authority there is.
"""

from __future__ import annotations

import contextlib
import json
import socket
from functools import partial
from pathlib import Path

import cattrs
import structlog
import trio

from agent import hand
from agent.config import Config
from agent.errors import AgentError
from agent.hand import Listing
from agent.lift_record import LiftRecord
from agent.service import AgentService

log = structlog.get_logger("failback.agent")

SOCKET_NAME = "local.sock"
MAX_LINE_BYTES = 1 << 20
READ_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 150.0
"""How long whoever asks waits: an order of the pair that is being carried out ends first."""


class NoAgent(AgentError):
    """No agent listens on this host."""

    code = "no-agent"


class LocalRefused(AgentError):
    """The agent on this host said no."""

    code = "refused"


# --- the agent's end ----------------------------------------------------------------------------------------------


async def listen_locally(config: Config) -> trio.SocketListener:
    """The socket, in place of one that a former agent left. Raises `OSError`."""
    path = config.runtime_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    made = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await made.bind(str(path))
    path.chmod(0o600)
    made.listen(8)
    return trio.SocketListener(made)


async def serve_locally(service: AgentService, listener: trio.SocketListener) -> None:
    """Answer until cancelled; nothing is left of the socket then."""
    try:
        await trio.serve_listeners(partial(_answer, service), [listener])
    finally:
        (service.config.runtime_dir / SOCKET_NAME).unlink(missing_ok=True)


async def _answer(service: AgentService, stream: trio.SocketStream) -> None:
    answer: dict[str, object]
    async with stream:
        try:
            with trio.fail_after(READ_TIMEOUT_S):
                request = json.loads(await _line(stream))
            answer = await _carry_out(service, request)
        except AgentError as error:
            answer = {"error": error.sentence}
        except (trio.TooSlowError, ValueError, KeyError, TypeError) as error:
            answer = {"error": f"the agent does not understand what it was asked on its local socket: {error}"}
        except trio.BrokenResourceError:
            return
        except Exception:  # must not end the agent
            log.exception("a local request failed in a way nobody foresaw")
            answer = {"error": "the agent failed in a way nobody foresaw; its log says more"}
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(READ_TIMEOUT_S):
            await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _carry_out(service: AgentService, request: dict[str, str]) -> dict[str, object]:
    match request["ask"]:
        case "fences":
            listed = await service.threads.on_disk(lambda: hand.listing(service.fences, agent_runs=True))
            return {"listing": cattrs.unstructure(listed)}
        case "lift":
            record = await _lift(service, request["vm"], request["by"], request["reason"])
            return {"lifted": cattrs.unstructure(record)}
        case other:
            raise LocalRefused(f"this agent does not know the local request {other}: restart it, it is an older one")


async def _lift(service: AgentService, vm: str, by: str, reason: str) -> LiftRecord:
    """Alone with the pair, and with nothing of it left that reads or writes the VM's disks."""
    fence = await service.threads.on_libvirt(lambda: hand.fence_named(service.fences, vm))
    async with service.authority.turn(fence.pair):
        await service.passes.end(fence.pair)

        def lift() -> LiftRecord:
            service.views.close_of(fence.vm_uuid)
            return hand.lift(service.fences, service.evidence, fence.vm_uuid, by=by, reason=reason)

        # Not to be left half-way by a person's Ctrl-C: the thread goes on anyhow.
        record = await service.threads.on_libvirt(lift)
    log.warning("a fence was lifted by hand", vm=fence.vm_name or fence.vm_uuid, pair=fence.pair, by=by, reason=reason)
    return record


async def _line(stream: trio.SocketStream) -> bytes:
    received = b""
    while not received.endswith(b"\n"):
        more = await stream.receive_some(65536)
        if not more or len(received) > MAX_LINE_BYTES:
            raise ValueError("no whole line")
        received += more
    return received


# --- the other end ------------------------------------------------------------------------------------------------


def ask_agent(runtime_dir: Path, request: dict[str, str]) -> dict[str, object]:
    """Ask the agent of this host; blocks.

    Raises:
        NoAgent: none listens; `LocalRefused`: it says no, or does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(ANSWER_TIMEOUT_S)
        try:
            client.connect(str(runtime_dir / SOCKET_NAME))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoAgent("no failback-agent listens on this host") from error
        except OSError as error:
            raise LocalRefused(f"the agent on this host cannot be asked: {error.strerror}; do it as root") from error
        try:
            client.sendall(json.dumps(request).encode() + b"\n")
            received = b""
            while not received.endswith(b"\n"):
                more = client.recv(65536)
                if not more:
                    raise NoAgent("the failback-agent of this host ended before it answered")
                received += more
        except TimeoutError as error:
            raise LocalRefused(
                f"the agent on this host did not answer within {ANSWER_TIMEOUT_S:.0f} s: it works on an order of the "
                "pair, or hangs; look at its log, end it (`systemctl stop failback-agent`), then repeat"
            ) from error
        except OSError as error:
            raise NoAgent("the failback-agent of this host ended before it answered") from error
    answer: dict[str, object] = json.loads(received)
    if "error" in answer:
        raise LocalRefused(str(answer["error"]))
    return answer


def asked_listing(runtime_dir: Path) -> Listing:
    """What the running agent says is fenced. Raises as `ask_agent`."""
    return cattrs.structure(ask_agent(runtime_dir, {"ask": "fences"})["listing"], Listing)


def asked_lift(runtime_dir: Path, vm: str, *, by: str, reason: str) -> LiftRecord:
    """Have the running agent lift that fence. Raises as `ask_agent`."""
    request = {"ask": "lift", "vm": vm, "by": by, "reason": reason}
    return cattrs.structure(ask_agent(runtime_dir, request)["lifted"], LiftRecord)
