"""The agent's end of control connections, in trio: accept, let coordinators in, run a handler for each request."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from protocol import limits
from protocol.connection import Speaker, agree, no_common_version
from protocol.control_pipe import ControlPipe
from protocol.errors import LocalMisuse, ProtocolError
from protocol.messages import Cancel, Failure, Goodbye, Hello, PassProgress, Ping, Pong, Reply, Request, Role, Welcome
from protocol.software import SOFTWARE
from protocol.tls import PeerIdentity
from protocol.tls_stream import TlsStream

ProgressSink = Callable[[PassProgress], Awaitable[None]]
Handler = Callable[[Request, PeerIdentity, ProgressSink], Awaitable[Reply]]
ErrorMap = Callable[[Exception], Failure | None]

MAX_QUEUED_PROGRESS = 16
"""Progress is dropped while so many messages wait for a peer that reads slowly: the next one tells the same, newer."""

_log = logging.getLogger(__name__)


async def serve_control(
    listeners: Sequence[trio.SocketListener],
    context: ssl.SSLContext,
    handler: Handler,
    *,
    host: str,
    map_error: ErrorMap,
    max_connections: int = limits.MAX_CONTROL_CONNECTIONS,
    handshake_timeout_s: float = 10.0,
    silent_after_s: float = 30.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept and serve control connections until cancelled; each then gets a Goodbye. Closes `listeners`.

    Args:
        listeners: from ``trio.open_tcp_listeners``.
        context: from `protocol.tls.server_context`.
        handler: ``await handler(request, peer, progress)`` gives the reply. It runs in a task of its own, several at
            once; it is cancelled by the peer's `Cancel` (which is answered with a Failure of code ``cancelled``, unless
            the handler ends with a reply or an error all the same) and when the connection ends. ``await
            progress(PassProgress(...))`` is for `RunPass` alone; it never waits long. `Ping` never reaches it.
        host: what this agent calls itself.
        map_error: what to answer for an error the handler raised; None: a Failure of code ``internal``. It is the place
            to log the error. A failing request never ends the connection.
        max_connections: open connections; more are refused (code ``busy``).
        handshake_timeout_s: from TCP connection to `Welcome`.
        silent_after_s: a peer that says nothing for so long is gone; coordinators ping three times as often.
    """
    server = _Server(
        context=context,
        handler=handler,
        host=host,
        map_error=map_error,
        max_connections=max_connections,
        handshake_timeout_s=handshake_timeout_s,
        silent_after_s=silent_after_s,
    )
    task_status.started()
    await trio.serve_listeners(server.serve, list(listeners))


@dataclass(kw_only=True)
class _Server:
    """What all connections of an agent share."""

    context: ssl.SSLContext
    handler: Handler
    host: str
    map_error: ErrorMap
    max_connections: int
    handshake_timeout_s: float
    silent_after_s: float
    _shaking_hands: int = 0
    _open: int = 0

    async def serve(self, tcp: trio.SocketStream) -> None:
        """One connection from beginning to end. Raises nothing but cancellation."""
        if self._shaking_hands >= limits.MAX_HANDSHAKES:
            await trio.aclose_forcefully(tcp)  # not worth a handshake
            return
        peer_name = _address(tcp)
        stream = TlsStream(tcp, self.context, peer_name, None)
        session: _Session | None = None
        self._shaking_hands += 1
        try:
            with trio.move_on_after(self.handshake_timeout_s):
                session = await self._let_in(stream, peer_name)
        except ProtocolError as error:
            _log.warning("a control connection was refused: %s", error.sentence)
            await stream.aclose(politely=True)
            return
        finally:
            self._shaking_hands -= 1
        if session is None:
            await stream.aclose(politely=False)
            return
        self._open += 1
        try:
            await session.run()
        finally:
            self._open -= 1

    async def _let_in(self, stream: TlsStream, peer_name: str) -> _Session | None:
        """The handshake; None when the peer was refused and told why."""
        peer = await stream.handshake()
        pipe = ControlPipe(stream, Speaker.LISTENER, peer_name, self.silent_after_s)
        if peer.role is not Role.COORDINATOR:
            await self._refuse(pipe, peer_name, "forbidden", "the certificate shown is not a coordinator's")
            return None
        hello = (await pipe.next_event()).message
        if isinstance(hello, Goodbye):
            return None
        assert isinstance(hello, Hello), hello  # the table allows nothing else
        version = agree(hello.versions)
        if hello.role is not Role.COORDINATOR:
            await self._refuse(pipe, peer_name, "forbidden", "only coordinators open control connections")
        elif version is None:
            sentence = no_common_version(hello.versions, f"the agent on {self.host}")
            await self._refuse(pipe, peer_name, "version", sentence)
        elif self._open >= self.max_connections:
            sentence = f"the agent on {self.host} has {self.max_connections} control connections already; try later"
            await self._refuse(pipe, peer_name, "busy", sentence)
        else:
            await pipe.say(pipe.connection.say(Welcome(version=version, software=SOFTWARE, host=self.host)))
            return _Session(self, pipe, peer)
        return None

    async def _refuse(self, pipe: ControlPipe, peer_name: str, code: str, sentence: str) -> None:
        _log.warning("%s was refused: %s", peer_name, sentence)
        await pipe.refuse(code, sentence)


@dataclass
class _Session:
    """An open connection and the requests at work on it."""

    server: _Server
    pipe: ControlPipe
    peer: PeerIdentity
    _working: dict[int, trio.CancelScope] = field(default_factory=dict)

    async def run(self) -> None:
        """Until the connection ends, whichever way; every handler has ended then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                try:
                    await self._listen(nursery)
                finally:
                    for scope in self._working.values():
                        scope.cancel()
                    await self.pipe.close("stopping", f"the agent on {self.server.host} is stopping")
                    nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            self._failure(group)  # a mistake of ours; it ends this connection alone

    async def _listen(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                event = await self.pipe.next_event()
                message = event.message
                if isinstance(message, Goodbye):
                    return
                if isinstance(message, Cancel):
                    if message.request in self._working:
                        self._working[message.request].cancel()
                elif isinstance(message, Ping):
                    self._answer(event.number, message, Pong())
                elif isinstance(message, Request):
                    self._working[event.number] = trio.CancelScope()
                    nursery.start_soon(self._work, event.number, message)
        except ProtocolError as error:
            _log.info("a control connection ended: %s", error.sentence)

    async def _write(self, whole: trio.CancelScope) -> None:
        try:
            await self.pipe.write()
        except ProtocolError as error:
            _log.info("a control connection ended: %s", error.sentence)
            whole.cancel()

    async def _work(self, number: int, request: Request) -> None:
        scope = self._working[number]
        answer: Reply | Failure = Failure(
            code="cancelled", sentence=f"{type(request).__name__} was cancelled as asked", facts={}
        )
        try:
            with scope:
                answer = await self.server.handler(request, self.peer, partial(self._progress, number))
        except BaseExceptionGroup as group:
            cancelled, failed = group.split(trio.Cancelled)
            if isinstance(failed, ExceptionGroup):
                answer = self._failure(failed)
            elif failed is not None:
                raise  # an interrupt from the keyboard, say
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a handler raises becomes an answer
            answer = self._failure(error)
        finally:
            del self._working[number]
        self._answer(number, request, answer)

    async def _progress(self, number: int, progress: PassProgress) -> None:
        wanted = self.pipe.connection.alive and self.pipe.queued_messages < MAX_QUEUED_PROGRESS
        if wanted and number in self.pipe.connection.outstanding:
            self.pipe.put(self.pipe.connection.say(progress, number))
        await trio.lowlevel.checkpoint()

    def _failure(self, error: Exception) -> Failure:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # the handler's nurseries are its own affair
        failure = self.server.map_error(error)
        if failure is not None:
            return failure
        return Failure(code="internal", sentence="the agent failed in a way nobody foresaw; see its log", facts={})

    def _answer(self, number: int, request: Request, answer: Reply | Failure) -> None:
        if not self.pipe.connection.alive:
            return
        try:
            self.pipe.put(self.pipe.connection.say(answer, number))
        except LocalMisuse as error:
            _log.error("the answer to %s could not be sent: %s", type(request).__name__, error.sentence)
            excuse = Failure(code="internal", sentence=f"the agent could not answer: {error.sentence}"[:1000], facts={})
            self.pipe.put(self.pipe.connection.say(excuse, number))


def _address(tcp: trio.SocketStream) -> str:
    try:
        return f"the coordinator at {tcp.socket.getpeername()[0]}"
    except OSError:
        return "the coordinator"
