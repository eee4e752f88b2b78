"""A TLS socket that one thread may read while another writes, and that any thread can wake.

TLS works on buffers in memory, and the socket is read and written beside it: a chunk of many records moves in one
system call, where OpenSSL on a socket of its own takes one to write a record and two to read one. An OpenSSL connection
must not be used by two threads at once, and Python 3.11's ``ssl`` releases the GIL around it without a lock of its own,
so each call into TLS holds a lock. The socket does not block: threads wait in ``poll``, outside of that lock, together
with an eventfd that ends every wait.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

from protocol.errors import ConnectionLost, ProtocolError
from protocol.link import CUT_AFTER_S, NO_FACTS, LinkFacts, link_facts, link_is_cut
from protocol.tls import PeerIdentity, explain, peer_identity

Buffer = bytes | bytearray | memoryview

WRITE_TURN_BYTES = 256 * 1024
"""Plain bytes encrypted in one turn, without the GIL and at one system call: enough to make the cost of a turn vanish,
little enough to stay in a core's cache until the kernel has copied it."""

READ_TURN_BYTES = 256 * 1024
"""Received in one system call, for the same reasons."""

RECORD_BYTES = 16 * 1024
"""Plain bytes of a full TLS record; what is smaller shares a record, and a packet, with what follows it."""

LINGER_S = 2.0
"""How long a polite close waits for the peer to close too."""

LOOK_S = 5.0
"""How often a thread that waits looks whether the link still answers at all."""


class TlsSocket:
    """Plain bytes in and out of a TCP connection that speaks TLS. Takes the socket over.

    Args:
        sock: the TCP socket, connected.
        context: from `protocol.tls`.
        peer: how error sentences call the other end.
        server_name: the DNS name its certificate must carry, when we connected; None when we listen.

    Attributes:
        waited_for_link_s: how long `send_all` has waited for the kernel to take more.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, peer: str, server_name: str | None) -> None:
        self._sock = sock
        self._peer = peer
        self._arrived = ssl.MemoryBIO()
        self._leaving = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._arrived, self._leaving, server_side=server_name is None, server_hostname=server_name
        )
        # Into a buffer, and says how much; the type stubs know only the form that returns bytes.
        self._read = cast("Callable[[int, memoryview], int]", self._tls.read)
        self._raw = memoryview(bytearray(READ_TURN_BYTES))
        self._unfed = self._raw[:0]  # received, and not yet given to TLS
        self._turn = _Turn()
        self._ending = threading.Lock()
        self._writer_waits = False
        self._down = False
        self._closed = False
        self._ended = False
        self._hungry = True
        self._facts = NO_FACTS
        self.waited_for_link_s = 0.0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pollers = {events: self._poller(events) for events in (select.POLLIN, select.POLLOUT)}

    def handshake(self, deadline: float) -> PeerIdentity:
        """Shake hands, until `deadline` (of `time.monotonic`); returns who the peer is.

        When that fails the alert that says why is given time to reach the peer, and the socket is closed. Raises
        ConnectionLost, PeerViolation.
        """
        try:
            while True:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    self._tls.do_handshake()
                    self._sock.sendall(self._leaving.read())
                    break
                except ssl.SSLWantReadError:
                    self._sock.sendall(self._leaving.read())
                    if count := self._sock.recv_into(self._raw):
                        self._arrived.write(self._raw[:count])
                    else:
                        self._arrived.write_eof()
            self._sock.setblocking(False)
            return peer_identity(self._tls)
        except (OSError, ProtocolError) as error:
            if isinstance(error, ssl.SSLError):
                with suppress(OSError):
                    self._sock.sendall(self._leaving.read())
                linger(self._sock)
            self.close(politely=False)
            if isinstance(error, ProtocolError):
                raise
            raise explain(error, self._peer) from error

    def receive_into(self, space: memoryview, idle_timeout_s: float) -> int:
        """Put at least one byte into `space`, or as many as are there; returns how many, 0 when the peer closed.

        Raises ConnectionLost: broken, nothing came for `idle_timeout_s`, or `wake` was called. PeerViolation: no TLS.
        """
        # Of plain bytes: somebody who dribbles parts of records says nothing.
        deadline = time.monotonic() + idle_timeout_s
        have = 0
        while not self._down:
            with self._turn:
                have += self._decrypt(space[have:])
            if have == len(space) or self._ended:
                return have
            if self._hungry and not self._take_in():
                if have:
                    return have
                self._wait(select.POLLIN, deadline, f"sent nothing for {idle_timeout_s:g} seconds")
        raise self._shut_down()

    def send_all(self, buffers: Sequence[Buffer], idle_timeout_s: float) -> int:
        """Write all of the buffers, in order; returns the number of bytes. One thread at a time.

        Raises ConnectionLost as `receive_into` does, and is then of no use any more: part of it may have been sent.
        """
        total = 0
        for buffer in _joined(buffers):
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), WRITE_TURN_BYTES):
                self._put_out(self._encrypt(view[start : start + WRITE_TURN_BYTES]), idle_timeout_s)
            total += len(view)
        return total

    def wake(self) -> None:
        """From any thread: end every wait, now and later, with ConnectionLost. Repeatable."""
        with self._ending:
            if not self._down and not self._closed:
                self._down = True
                os.eventfd_write(self._wake, 1)
                # The peer learns of it. Not the receiving direction: what still came in would be answered with a
                # reset, which may overtake our last word.
                _shut(self._sock)

    def close(self, *, politely: bool) -> None:
        """Release everything; no thread may be using it any more. Repeatable.

        Politely: let the peer read our last word first. Closing a socket that holds unread bytes resets the connection,
        which may overtake what we said.
        """
        if politely and not self._closed:
            linger(self._sock)
        self.link()
        with self._ending:
            if not self._closed:
                self._closed = True
                self._sock.close()
                os.close(self._wake)

    def link(self) -> LinkFacts:
        """What the kernel knows of the connection; from any thread. Once it is closed: what was known then."""
        with self._ending:
            if not self._closed:
                self._facts = link_facts(self._sock) or self._facts
            return self._facts

    # --- inside ---

    def _poller(self, events: int) -> select.poll:
        poller = select.poll()
        poller.register(self._sock.fileno(), events)
        poller.register(self._wake, select.POLLIN)
        return poller

    def _decrypt(self, space: memoryview) -> int:
        """Put plain bytes into `space`, until it is full, or TLS needs more from the socket (then it is hungry), or the
        stream has ended, or a writer wants its turn; returns how many."""
        if self._unfed:
            self._arrived.write(self._unfed)
            self._unfed = self._raw[:0]
        self._hungry = False
        have, size = 0, len(space)
        try:
            while have < size and not (have and self._writer_waits):
                count = self._read(size - have, space[have:])  # one record at most
                if not count:
                    self._ended = True
                    break
                have += count
        except ssl.SSLWantReadError:
            self._hungry = True
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._ended = True
        except ssl.SSLError as error:
            if not have:  # otherwise it comes again
                raise self._lost(error) from error
        return have

    def _take_in(self) -> bool:
        """Receive a chunk of records, or the end, from the socket; False when nothing is there yet."""
        try:
            count = self._sock.recv_into(self._raw)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error
        if count:
            self._unfed = self._raw[:count]
        else:
            self._arrived.write_eof()
        return True

    def _encrypt(self, view: memoryview) -> bytes:
        self._writer_waits = True
        with self._turn:
            self._writer_waits = False
            try:
                self._tls.write(view)
            except ssl.SSLError as error:
                raise self._lost(error) from error
            return self._leaving.read()

    def _put_out(self, sealed: bytes, idle_timeout_s: float) -> None:
        rest = memoryview(sealed)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                began = time.monotonic()
                self._wait(select.POLLOUT, began + idle_timeout_s, f"took nothing for {idle_timeout_s:g} seconds")
                self.waited_for_link_s += time.monotonic() - began
            except OSError as error:
                raise self._lost(error) from error

    def _wait(self, events: int, deadline: float, idle: str) -> None:
        while not self._down:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConnectionLost(f"{self._peer} {idle}")
            if self._pollers[events].poll(1000 * min(left, LOOK_S)):
                break
            if link_is_cut(self._sock):
                raise ConnectionLost(f"{self._peer} acknowledged nothing for {CUT_AFTER_S:g} seconds; is the link cut?")
        if self._down:
            raise self._shut_down()

    def _lost(self, error: OSError) -> Exception:
        return self._shut_down() if self._down else explain(error, self._peer)

    def _shut_down(self) -> ConnectionLost:
        return ConnectionLost(f"the connection with {self._peer} was shut down on this side")


class _Turn:
    """Who may use TLS. Locks are not fair: without a place to be next at, a fast stream would keep taking it again, and
    our own short answers would wait."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._next = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._busy.acquire()

    def __exit__(self, *_: object) -> None:
        self._busy.release()


def linger(sock: socket.socket) -> None:
    """Stop sending, then throw away what still comes until the peer closes too, `LINGER_S` at most.

    TLS is not spoken any more: the last word, or the alert, is out already.
    """
    deadline = time.monotonic() + LINGER_S
    _shut(sock)
    scrap = bytearray(65536)
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if not sock.recv_into(scrap):
                return
        except OSError:
            return


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # the peer was faster
        sock.shutdown(socket.SHUT_WR)


def _joined(buffers: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in fewer buffers: a small one is filled up to a full TLS record from its successors."""
    joined: list[Buffer] = []
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        room = RECORD_BYTES - len(joined[-1]) if joined else 0
        if room > 0:
            joined[-1] = b"".join((joined[-1], rest[:room]))
            rest = rest[room:]
        if len(rest):
            joined.append(rest)
    return joined
