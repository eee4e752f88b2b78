"""The coordinator's end of control connections, in trio; the agent's end is `protocol.control_server`.

``async with open_control(...) as channel: reply = await channel.ask(request, timeout_s=60)``. Any number of tasks may
ask at once.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn, cast

import trio

from protocol import limits
from protocol.connection import Received, Speaker
from protocol.control_pipe import ControlPipe
from protocol.control_server import ErrorMap, Handler, ProgressSink, serve_control
from protocol.errors import ConnectionLost, PeerEnded, PeerViolation, ProtocolError, RequestFailed, RequestTimedOut
from protocol.messages import (
    PROTOCOL_VERSIONS,
    Failure,
    Goodbye,
    Hello,
    PassProgress,
    Ping,
    Reply,
    Request,
    Role,
    Welcome,
)
from protocol.software import SOFTWARE
from protocol.tls import PeerIdentity, explain
from protocol.tls_stream import TlsStream

__all__ = ["ControlChannel", "ErrorMap", "Handler", "ProgressSink", "open_control", "serve_control"]

CANCELLED = "cancelled"
"""Code of the Failure that answers a request which was cancelled."""


class _Asked:
    """A request on its way: what came for it so far, and an event for more."""

    def __init__(self) -> None:
        self.answer: Reply | Failure | None = None
        self.progress: PassProgress | None = None
        self.changed = trio.Event()


class ControlChannel:
    """An open control connection; made by `open_control`.

    Attributes:
        peer: who the agent's certificate says it is.
        agent_host, agent_software: what the agent calls itself.
    """

    def __init__(
        self, pipe: ControlPipe, peer: PeerIdentity, welcome: Welcome, ping_after_s: float, cancel_grace_s: float
    ) -> None:
        self.peer = peer
        self.agent_host = welcome.host
        self.agent_software = welcome.software
        self._pipe = pipe
        self._ping_after_s = ping_after_s
        self._cancel_grace_s = cancel_grace_s
        self._asked: dict[int, _Asked] = {}
        self._lost: ProtocolError | None = None
        self._ended = trio.Event()
        # One place stays free for Ping.
        self._places = trio.Semaphore(limits.MAX_OUTSTANDING_REQUESTS - 1)

    async def ask(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[PassProgress], object] | None = None,
    ) -> Reply:
        """Ask, and wait for the reply.

        Whoever stops waiting (cancelled, or `on_progress` raised) makes the agent stop too: `Cancel` is sent and its
        answer awaited, so that nothing is left half known; an agent that does not even answer that within the
        channel's ``cancel_grace_s`` loses the connection.

        Args:
            timeout_s: how long the reply may take; None: as long as the connection lives.
            on_progress: called in this task with the newest progress; may be async. It may miss some.

        Raises:
            RequestFailed: the agent answered with a failure; code, sentence and facts are in it.
            RequestTimedOut: it took too long, was cancelled, and the agent confirmed that it stopped.
            ConnectionLost: the connection is gone, and the outcome is unknown.
            PeerViolation: the agent broke the protocol; the connection is gone.
            LocalMisuse: the request cannot be written down.
        """
        async with self._places:
            if self._lost is not None:
                raise self._lost.with_traceback(None)
            number, buffers = self._pipe.connection.ask(request)
            asked = self._asked[number] = _Asked()
            self._pipe.put(buffers)
            try:
                with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
                    await self._await_answer(asked, on_progress)
                in_time = asked.answer is not None
            finally:
                if asked.answer is None:
                    await self._stop(number, asked)
                del self._asked[number]
            return self._reply(asked, request, in_time, timeout_s)

    def _reply(self, asked: _Asked, request: Request, in_time: bool, timeout_s: float | None) -> Reply:
        answer = asked.answer
        if answer is None:
            raise self._lost.with_traceback(None) if self._lost else AssertionError("neither answered nor lost")
        if not isinstance(answer, Failure):
            return answer
        if answer.code == CANCELLED and not in_time:
            raise RequestTimedOut(
                f"{type(request).__name__} took longer than {timeout_s:g} seconds; the agent was told to stop and did"
            )
        raise RequestFailed(answer.code, answer.sentence, answer.facts)

    async def _await_answer(self, asked: _Asked, on_progress: Callable[[PassProgress], object] | None) -> None:
        """Wait until there is an answer, or the connection is lost, which is raised."""
        while True:
            await asked.changed.wait()
            asked.changed = trio.Event()
            progress, asked.progress = asked.progress, None
            if progress is not None and on_progress is not None:
                result = on_progress(progress)
                if isinstance(result, Awaitable):
                    await result
            if asked.answer is not None:
                return
            if self._lost is not None:
                raise self._lost.with_traceback(None)

    async def _stop(self, number: int, asked: _Asked) -> None:
        """Cancel a request and wait for its answer; the connection ends if there is none. Never raises."""
        if self._lost is not None:
            return
        self._pipe.put(self._pipe.connection.cancel(number))
        with trio.move_on_after(self._cancel_grace_s, shield=True):
            while asked.answer is None and self._lost is None:
                await asked.changed.wait()
                asked.changed = trio.Event()
        if asked.answer is None:
            self._fail(ConnectionLost(f"the agent did not stop a request within {self._cancel_grace_s:g} seconds"))

    # --- background tasks: they never raise, and end when the pipe is closed -----------------------------------
    # Shielded: when everything around the channel is cancelled at once, a `Cancel` must still get its answer.

    async def _listen(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                while True:
                    self._take(await self._pipe.next_event())
            except ProtocolError as error:
                self._fail(error)

    def _take(self, event: Received) -> None:
        if isinstance(event.message, Goodbye):
            raise self._pipe.connection.lost()
        asked = self._asked.get(event.number)
        if asked is None:
            return  # a Pong
        if isinstance(event.message, PassProgress):
            asked.progress = event.message
        else:
            asked.answer = cast("Reply | Failure", event.message)
        asked.changed.set()

    async def _write(self) -> None:
        try:
            await self._pipe.write()
        except ProtocolError as error:
            self._fail(error)

    async def _ping(self) -> None:
        """Ask for a sign of life where nothing was heard for a while, and give one where nothing was said, as in a pass
        whose progress is told all the time; `ControlPipe` ends what stays silent, on either side."""
        while self._lost is None:
            quiet_s = trio.current_time() - min(self._pipe.last_heard, self._pipe.last_said)
            if quiet_s >= self._ping_after_s:
                if not any(isinstance(request, Ping) for request in self._pipe.connection.outstanding.values()):
                    self._pipe.put(self._pipe.connection.ask(Ping())[1])
                quiet_s = 0.0
            with trio.move_on_after(self._ping_after_s - quiet_s, shield=True):
                await self._ended.wait()

    def _fail(self, error: ProtocolError) -> None:
        if self._lost is None:
            self._lost = error
        self._ended.set()
        for asked in self._asked.values():
            asked.changed.set()


@asynccontextmanager
async def open_control(
    host: str,
    port: int,
    *,
    server_name: str,
    context: ssl.SSLContext,
    connect_timeout_s: float = 10.0,
    ping_after_s: float = 10.0,
    silent_after_s: float = 30.0,
    cancel_grace_s: float = 30.0,
) -> AsyncIterator[ControlChannel]:
    """Connect to an agent, check its certificate, shake hands; the channel lives as long as the block.

    When the connection is lost inside of the block, pending and later asks raise; the block itself is not interrupted.

    Args:
        host, port: where to connect to; `server_name`: the DNS name the agent's certificate must carry.
        context: from `protocol.tls.client_context`.
        connect_timeout_s: for TCP, TLS and the handshake together.
        ping_after_s: after so long without a word the agent is asked for a sign of life.
        silent_after_s: after so long without a word the connection counts as lost; more than `ping_after_s`.
        cancel_grace_s: how long an agent may take to answer a cancelled request.

    Raises:
        ConnectionLost: cannot connect, or (PeerEnded) the agent refuses, for the reason in the sentence.
        PeerViolation: the certificate is not acceptable, or the agent breaks the protocol.
    """
    peer_name = f"the agent {server_name} ({host} port {port})"
    with trio.move_on_after(connect_timeout_s) as patience:
        pipe, peer, welcome = await _connect(host, port, server_name, context, peer_name, silent_after_s)
    if patience.cancelled_caught:
        raise ConnectionLost(f"{peer_name} did not answer within {connect_timeout_s:g} seconds")
    channel = ControlChannel(pipe, peer, welcome, ping_after_s, cancel_grace_s)
    try:
        async with trio.open_nursery() as nursery:
            for task in (channel._listen, channel._write, channel._ping):
                nursery.start_soon(task)
            try:
                yield channel
            finally:
                channel._fail(ConnectionLost("the control connection was closed on this side"))
                await pipe.close("done", "the coordinator has no more questions")
    except BaseExceptionGroup as group:
        _raise_as_it_was(group)


def _raise_as_it_was(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """The tasks of a channel never raise, so one exception in the group is the block's own: let it out as it came."""
    if len(group.exceptions) != 1:
        raise group
    (error,) = group.exceptions
    try:
        raise error
    finally:
        error.__context__ = None if error.__context__ is group else error.__context__
        del error, group


async def _connect(
    host: str, port: int, server_name: str, context: ssl.SSLContext, peer_name: str, silent_after_s: float
) -> tuple[ControlPipe, PeerIdentity, Welcome]:
    try:
        tcp = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise explain(error, peer_name) from error
    stream = TlsStream(tcp, context, peer_name, server_name)
    try:
        peer = await stream.handshake()
        if peer.role is not Role.AGENT:
            raise PeerViolation(f"the certificate of {peer_name} is not an agent's")
        pipe = ControlPipe(stream, Speaker.CALLER, peer_name, silent_after_s)
        hello = Hello(versions=PROTOCOL_VERSIONS, software=SOFTWARE, role=Role.COORDINATOR)
        await pipe.say(pipe.connection.say(hello))
        message = (await pipe.next_event()).message
    except BaseException:
        with trio.CancelScope(shield=True):
            await stream.aclose(politely=False)
        raise
    if isinstance(message, Goodbye):
        await stream.aclose(politely=False)
        raise PeerEnded(f"{peer_name} refused the connection: {message.sentence}", goodbye_code=message.code)
    assert isinstance(message, Welcome), message  # the table allows nothing else
    return pipe, peer, message
