"""A TLS socket that one thread may read while another writes, and that any thread can wake.

An OpenSSL connection must not be used by two threads at once, and Python 3.11's ``ssl`` releases the GIL around it
without a lock of its own. So the socket does not block, each call into TLS holds a lock, and threads wait for readiness
in ``poll`` outside of it, together with an eventfd that ends every wait.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from protocol.errors import ConnectionLost
from protocol.tls import explain

Buffer = bytes | bytearray | memoryview

WRITE_TURN_BYTES = 1024 * 1024
"""Write at most so much in one call; OpenSSL wants an interrupted write repeated with the same bytes."""

RECORD_BYTES = 16 * 1024
"""Plain bytes of a full TLS record; what is smaller shares a record, and a packet, with what follows it."""

ODD_WAIT_S = 0.05
"""How long a writer waits to read, or a reader to write (a key update): the other thread may take what it waits for."""

LINGER_S = 2.0
"""How long a polite close waits for the peer to close too."""


class TlsSocket:
    """Plain bytes in and out of an ``SSLSocket`` whose handshake is through. Takes the socket over.

    Args:
        sock: the socket; becomes non-blocking.
        peer: how error sentences call the other end.
    """

    def __init__(self, sock: ssl.SSLSocket, peer: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._tls = threading.Lock()
        self._next = threading.Lock()
        self._ending = threading.Lock()
        self._writer_waits = False
        self._down = False
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pollers = {
            (side, events): self._poller(events)
            for side in ("read", "write")
            for events in (select.POLLIN, select.POLLOUT)
        }

    def receive_into(self, space: memoryview, idle_timeout_s: float) -> int:
        """Put at least one byte into `space`; returns how many, 0 when the peer closed.

        Raises ConnectionLost: broken, nothing came for `idle_timeout_s`, or `wake` was called. PeerViolation: no TLS.
        """
        while True:
            with self._turn():
                count, events = self._read(space)
            if count or events == 0:
                return count
            self._wait("read", events, select.POLLIN, idle_timeout_s, "sent nothing")

    def send_all(self, buffers: Sequence[Buffer], idle_timeout_s: float) -> int:
        """Write all of the buffers, in order; returns the number of bytes. One thread at a time.

        Raises ConnectionLost as `receive_into` does, and is then of no use any more: part of it may have been sent.
        """
        total = 0
        for buffer in _joined(buffers):
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), WRITE_TURN_BYTES):
                self._send(view[start : start + WRITE_TURN_BYTES], idle_timeout_s)
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
                _shut(self._sock, socket.SHUT_WR)

    def close(self, *, politely: bool) -> None:
        """Release everything; no thread may be using it any more. Repeatable.

        Politely: let the peer read our last word first. Closing a socket that holds unread bytes resets the connection,
        which may overtake what we said.
        """
        if politely and not self._closed:
            linger(self._sock)
        with self._ending:
            if not self._closed:
                self._closed = True
                self._sock.close()
                os.close(self._wake)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold TLS. Locks are not fair: without a place to be next at, a fast stream would keep taking it again, and
        our own short answers would wait."""
        with self._next:
            self._tls.acquire()
        try:
            yield
        finally:
            self._tls.release()

    def _poller(self, events: int) -> select.poll:
        poller = select.poll()
        poller.register(self._sock.fileno(), events)
        poller.register(self._wake, select.POLLIN)
        return poller

    def _read(self, space: memoryview) -> tuple[int, int]:
        """What was read, and what to wait for when that is nothing: (0, 0) is the end of the stream."""
        have = 0
        try:
            while have < len(space) and not (self._down or (have and self._writer_waits)):
                count = self._sock.recv_into(space[have:])  # one TLS record at most
                if count == 0:
                    return have, 0
                have += count
        except ssl.SSLWantReadError:
            return have, select.POLLIN
        except ssl.SSLWantWriteError:
            return have, select.POLLOUT
        except OSError as error:
            if not have:
                raise self._lost(error) from error
        return have, select.POLLIN

    def _send(self, view: memoryview, idle_timeout_s: float) -> None:
        while True:
            self._writer_waits = True
            with self._turn():
                self._writer_waits = False
                try:
                    sent = self._sock.send(view)
                    events = select.POLLOUT
                except ssl.SSLWantWriteError:
                    sent, events = 0, select.POLLOUT
                except ssl.SSLWantReadError:
                    sent, events = 0, select.POLLIN
                except OSError as error:
                    raise self._lost(error) from error
            view = view[sent:]
            if not len(view):
                return
            if not sent:
                self._wait("write", events, select.POLLOUT, idle_timeout_s, "took nothing")

    def _wait(self, side: str, events: int, usual: int, idle_timeout_s: float, idle: str) -> None:
        deadline = time.monotonic() + idle_timeout_s
        while not self._down:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConnectionLost(f"{self._peer} {idle} for {idle_timeout_s:g} seconds")
            odd = events != usual
            if self._pollers[side, events].poll(1000 * (min(left, ODD_WAIT_S) if odd else left)) or odd:
                break
        if self._down:
            raise ConnectionLost(f"the connection with {self._peer} was shut down on this side")

    def _lost(self, error: OSError) -> Exception:
        if self._down:
            return ConnectionLost(f"the connection with {self._peer} was shut down on this side")
        return explain(error, self._peer)


def linger(sock: ssl.SSLSocket) -> None:
    """Stop sending, then throw away what still comes until the peer closes too, `LINGER_S` at most.

    TLS is not spoken any more: the last word, or the alert, is out already.
    """
    deadline = time.monotonic() + LINGER_S
    _shut(sock, socket.SHUT_WR)
    scrap = bytearray(65536)
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if not socket.socket.recv_into(sock, scrap):  # past TLS, which may be broken
                return
        except OSError:
            return


def _shut(sock: ssl.SSLSocket, how: int) -> None:
    """``shutdown(2)`` itself: that of ``SSLSocket`` also throws away its TLS state, under another thread's feet."""
    with suppress(OSError):  # the peer was faster
        socket.socket.shutdown(sock, how)


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
