"""The conversations as pure state machines: bytes in, events out, no I/O (in the spirit of h11).

A `Connection` is fed with bytes and gives `Received` events; asked to send, it gives buffers to put on the wire, in
that order. Who may say what when stands in one table per conversation; an unlisted message is refused. `LocalMisuse`:
our own code asked for something the table does not allow, nothing was sent, the connection lives on. `PeerViolation`:
the peer did, and the connection is dead for ever. Not thread-safe.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from protocol import limits
from protocol.codec import Message, decode, encode, members
from protocol.errors import ConnectionLost, LocalMisuse, PeerEnded, PeerViolation, ProtocolError
from protocol.framing import FrameReader, Stage, frame_prefix
from protocol.messages import (
    PROTOCOL_VERSIONS,
    Cancel,
    Failure,
    Goodbye,
    Hello,
    PassProgress,
    Reply,
    Request,
    RunPass,
    Welcome,
)

Buffer = bytes | bytearray | memoryview
Allocate = Callable[[int], memoryview]


class Speaker(enum.Enum):
    """The two ends: who connected, and who was connected to."""

    CALLER = "caller"  # coordinator; source agent
    LISTENER = "listener"  # agent; target agent

    @property
    def other(self) -> Speaker:
        """The other end."""
        return Speaker.LISTENER if self is Speaker.CALLER else Speaker.CALLER


class State(enum.Enum):
    """Where a conversation stands."""

    SILENT = "silent"  # nobody spoke yet: then ASKED
    ASKED = "asked"  # the caller said hello: then OPEN
    OPEN = "open"  # the conversation proper: then ENDING (bulk) or OVER
    ENDING = "ending"  # bulk: everything is sent, the target verifies: then OVER
    OVER = "over"  # somebody said a last word; nothing follows


Table = Mapping[tuple[State, Speaker], Mapping[type, State]]

CONTROL_TABLE: Table = {
    (State.SILENT, Speaker.CALLER): {Hello: State.ASKED, Goodbye: State.OVER},
    (State.SILENT, Speaker.LISTENER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.CALLER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.LISTENER): {Welcome: State.OPEN, Goodbye: State.OVER},
    (State.OPEN, Speaker.CALLER): {
        **dict.fromkeys(members(Request), State.OPEN),
        Cancel: State.OPEN,
        Goodbye: State.OVER,
    },
    (State.OPEN, Speaker.LISTENER): {
        **dict.fromkeys(members(Reply), State.OPEN),
        Failure: State.OPEN,
        PassProgress: State.OPEN,
        Goodbye: State.OVER,
    },
}
"""Control: (state, who speaks) -> what may be said, and the state after it."""


@dataclass(frozen=True, slots=True)
class Received:
    """The peer said `message`; `number` is its request number (0 where there is none), `payload` what came behind."""

    number: int
    message: Message
    payload: memoryview


class Breach(Exception):
    """A rule of the conversation was broken; by whom decides whether that is misuse or violation."""


NO_PAYLOAD = memoryview(b"")


class Connection:
    """What control and bulk have in common: frames, the table, and death after a violation.

    Args:
        us: which end this is.
        table: who may say what when.
        frames: limits of a frame once the handshake is through.
        allocate: gives the buffer for a payload of so many bytes (default: a new one); a pool may reuse them.
    """

    def __init__(self, us: Speaker, table: Table, frames: limits.FrameLimits, allocate: Allocate | None = None) -> None:
        self.us = us
        self.state = State.SILENT
        self.ended_by: Speaker | None = None
        self._table = table
        self._frames = frames
        self._allocate = allocate or _allocate
        self._reader = FrameReader(limits.HANDSHAKE)
        self._arriving: tuple[int, Message] | None = None
        self._payload = NO_PAYLOAD
        self._fed: list[memoryview] = []
        self._dead: PeerViolation | None = None
        self._goodbye: Goodbye | None = None

    @property
    def alive(self) -> bool:
        """False when somebody said a last word or the peer broke a rule."""
        return self.state is not State.OVER and self._dead is None

    # --- bytes in ---

    def want(self) -> memoryview:
        """Where the driver should receive the next bytes into; never empty. Report them with `filled`."""
        if self._discarding:
            return memoryview(bytearray(limits.HANDSHAKE.header_bytes))
        return self._reader.want()

    def filled(self, count: int) -> Received | None:
        """`count` bytes (at least 1) were received into the start of `want`. Returns the event they completed, if any.

        Raises PeerViolation, then and ever after.
        """
        if self._dead is not None:
            raise self._dead.with_traceback(None)
        if self._discarding:
            return None
        try:
            if self.state is State.OVER:
                raise PeerViolation("the peer went on speaking after its last word")
            return self._advance(count)
        except (PeerViolation, Breach) as error:
            self._dead = error if isinstance(error, PeerViolation) else PeerViolation(str(error))
            self._fed.clear()
            if error is self._dead:
                raise
            raise self._dead from error

    def feed(self, data: Buffer) -> None:
        """Take received bytes; `next_event` works through them."""
        if len(data):
            self._fed.append(memoryview(data).cast("B"))

    def next_event(self) -> Received | None:
        """The next event in the bytes fed, or None when more are needed. Raises PeerViolation, then and ever after."""
        if self._dead is not None:
            raise self._dead.with_traceback(None)
        while self._fed:
            data = self._fed[0]
            space = self.want()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            if count < len(data):
                self._fed[0] = data[count:]
            else:
                self._fed.pop(0)
            event = self.filled(count)
            if event is not None:
                return event
        return None

    def lost(self) -> ProtocolError:
        """What it means that the peer's bytes ended here: the error for whoever still waits for something."""
        if self._dead is not None:
            return self._dead
        if self._goodbye is not None:
            return PeerEnded(self._goodbye.sentence, goodbye_code=self._goodbye.code)
        if self.state is State.OVER:
            return ConnectionLost("the conversation is over")
        if not self._reader.between_frames or self._arriving is not None:
            return ConnectionLost("the connection broke off in the middle of a message")
        return ConnectionLost("the peer closed the connection without a word")

    # --- events out ---

    def _send(self, message: Message, number: int, payload: Sequence[Buffer]) -> list[Buffer]:
        """Buffers to put on the wire for that message, payload pieces uncopied. Raises LocalMisuse."""
        if self._dead is not None:
            raise LocalMisuse(f"the connection is dead: {self._dead.sentence}")
        try:
            following = self._following(self.us, message)
            header = encode(message, number)
            payload_bytes = sum(memoryview(piece).nbytes for piece in payload)
            allowed = self._frame_limits()
            if len(header) > allowed.header_bytes:
                raise Breach(f"{_name(message)} takes {len(header)} bytes; allowed are {allowed.header_bytes}")
            if payload_bytes > allowed.payload_bytes:
                raise Breach(f"{_name(message)} has {payload_bytes} bytes behind it; allowed: {allowed.payload_bytes}")
            self._check_header(self.us, number, message, payload_bytes)
            self._check_payload(self.us, number, message, payload)
        except Breach as error:
            raise LocalMisuse(str(error)) from error
        self._enter(following, self.us)
        return [frame_prefix(header, payload_bytes), *payload]

    def goodbye(self, code: str, sentence: str) -> list[Buffer]:
        """End the conversation, saying why; `sentence` is shortened to fit. Raises LocalMisuse when it is over."""
        return self._send(Goodbye(code=code, sentence=sentence[: limits.MAX_GOODBYE_CHARACTERS]), 0, ())

    # --- what a conversation adds ---

    def _check_header(self, speaker: Speaker, number: int, message: Message, payload_bytes: int) -> None:
        """Raise Breach unless `speaker` may say this now, as far as the header tells. Changes nothing."""

    def _check_payload(self, speaker: Speaker, number: int, message: Message, payload: Sequence[Buffer]) -> None:
        """Raise Breach unless the payload fits the header; then take the message into the books."""

    # --- inside ---

    @property
    def _discarding(self) -> bool:
        """We said the last word: whatever was under way from the peer is of no interest any more."""
        return self.state is State.OVER and self.ended_by is self.us

    def _frame_limits(self) -> limits.FrameLimits:
        return self._frames if self.state in (State.OPEN, State.ENDING) else limits.HANDSHAKE

    def _following(self, speaker: Speaker, message: Message) -> State:
        row = self._table.get((self.state, speaker), {})
        following = row.get(type(message))
        if following is None:
            raise Breach(
                f"{_name(message)} must not be said by the {speaker.value} while the state is {self.state.value}"
            )
        return following

    def _enter(self, state: State, speaker: Speaker) -> None:
        if state is State.OVER:
            self.ended_by = speaker
        self.state = state
        self._reader.limits = self._frame_limits()

    def _advance(self, count: int) -> Received | None:
        stage = self._reader.filled(count)
        if stage is Stage.HEADER:
            number, message = decode(self._reader.header)
            payload_bytes = self._reader.payload_bytes
            self._following(self.us.other, message)
            self._check_header(self.us.other, number, message, payload_bytes)
            if payload_bytes == 0:
                return self._arrived(number, message, NO_PAYLOAD)
            self._arriving = number, message
            self._payload = self._allocate(payload_bytes)
            self._reader.begin_payload(self._payload)
        elif stage is Stage.PAYLOAD:
            assert self._arriving is not None
            number, message = self._arriving
            payload, self._arriving, self._payload = self._payload, None, NO_PAYLOAD
            return self._arrived(number, message, payload)
        return None

    def _arrived(self, number: int, message: Message, payload: memoryview) -> Received | None:
        if self._discarding:
            return None  # we said our last word while its payload was under way
        # Looked up again: we may have spoken while the payload came in.
        following = self._following(self.us.other, message)
        self._check_payload(self.us.other, number, message, (payload,))
        if isinstance(message, Goodbye):
            self._goodbye = message
        self._enter(following, self.us.other)
        return Received(number, message, payload)


def _allocate(size_bytes: int) -> memoryview:
    return memoryview(bytearray(size_bytes))


def _name(message: Message) -> str:
    return type(message).__name__


def agree(offered: Sequence[int]) -> int | None:
    """The version to speak with a peer that offers those: the highest both know, or None."""
    return max(set(offered) & set(PROTOCOL_VERSIONS), default=None)


def no_common_version(offered: Sequence[int], us: str) -> str:
    """The sentence for a peer we have no version in common with; `us` names this side."""
    theirs = ", ".join(str(version) for version in sorted(offered)[:16]) or "none"
    ours = ", ".join(str(version) for version in sorted(PROTOCOL_VERSIONS))
    return (
        f"{us} speaks protocol version {ours}, the side that connected speaks {theirs}: "
        "install the same release of failback on both hosts"
    )


class ControlConnection(Connection):
    """One end of a control conversation: requests are numbered, answered once, each by its own type or a `Failure`.

    The coordinator is `Speaker.CALLER`, the agent `Speaker.LISTENER`.
    """

    def __init__(self, us: Speaker) -> None:
        super().__init__(us, CONTROL_TABLE, limits.CONTROL)
        self._outstanding: dict[int, Request] = {}
        self._last_number = 0
        self._offered: tuple[int, ...] = ()

    @property
    def outstanding(self) -> Mapping[int, Request]:
        """Requests that were asked and not answered yet, by number."""
        return self._outstanding

    def ask(self, request: Request) -> tuple[int, list[Buffer]]:
        """Coordinator: the request's number, and its bytes. Raises LocalMisuse, also when too many are outstanding."""
        number = self._last_number + 1
        return number, self._send(request, number, ())

    def cancel(self, number: int) -> list[Buffer]:
        """Coordinator: ask the agent to stop that request. It is still answered."""
        return self._send(Cancel(request=number), 0, ())

    def say(self, message: Message, number: int = 0) -> list[Buffer]:
        """Anything else: `Hello`, `Welcome`, and with the request's number a `Reply`, `Failure` or `PassProgress`."""
        return self._send(message, number, ())

    def _check_header(self, speaker: Speaker, number: int, message: Message, payload_bytes: int) -> None:
        if isinstance(message, Request):
            if not self._last_number < number <= limits.MAX_REQUEST_NUMBER:
                raise Breach(f"request number {number} does not rise above {self._last_number}")
            if len(self._outstanding) >= limits.MAX_OUTSTANDING_REQUESTS:
                raise Breach(f"more than {limits.MAX_OUTSTANDING_REQUESTS} requests are unanswered")
        elif isinstance(message, (Failure, PassProgress, *_REPLIES)):
            self._check_answer(number, message)
        elif number != 0:
            raise Breach(f"{_name(message)} has no request number, but carries {number}")
        elif isinstance(message, Cancel) and not 1 <= message.request <= self._last_number:
            # Of a request answered meanwhile: that Cancel and the answer have crossed, which is nobody's fault.
            raise Breach(f"Cancel names request {message.request}, which was never asked")
        elif isinstance(message, Welcome) and message.version not in self._offered:
            raise Breach(f"Welcome chooses version {message.version}, which was not offered")

    def _check_answer(self, number: int, message: Message) -> None:
        request = self._outstanding.get(number)
        if request is None:
            raise Breach(f"{_name(message)} answers request {number}, which is not open")
        if isinstance(message, Failure):
            return
        if isinstance(message, PassProgress):
            if not isinstance(request, RunPass):
                raise Breach(f"PassProgress for request {number}, which is no RunPass but {_name(request)}")
        elif type(message) is not request.reply:
            raise Breach(f"{_name(request)} is answered by {request.reply.__name__}, not by {_name(message)}")

    def _check_payload(self, speaker: Speaker, number: int, message: Message, payload: Sequence[Buffer]) -> None:
        if isinstance(message, Request):
            self._last_number = number
            self._outstanding[number] = message
        elif isinstance(message, (Failure, *_REPLIES)):
            del self._outstanding[number]
        elif isinstance(message, Hello):
            self._offered = message.versions


_REPLIES = tuple(members(Reply))
