"""What the tests of the protocol share: certificates good and bad, and two bulk machines talking without a wire."""

from __future__ import annotations

import datetime
import shutil
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import blake3
import pytest

from coordinator import pki
from protocol.bulk_connection import BulkConnection
from protocol.codec import Message, encode
from protocol.connection import Buffer, Connection, Received, Speaker
from protocol.errors import PeerEnded, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import BulkHello, BulkWelcome, CompareSpan, SpanAnswer
from protocol.tls import client_context, server_context

MIB = 2**20
BLOCK = 65536
AGENT_NAME = "kvm1.test"


@dataclass(frozen=True)
class Holder:
    """Who holds a certificate, and the CA it trusts."""

    issued: pki.Issued

    @property
    def fingerprint(self) -> str:
        """Of the certificate."""
        return self.issued.fingerprint

    def server(self) -> ssl.SSLContext:
        """Context of the side that listens."""
        return server_context(certificate=self.issued.certificate, key=self.issued.key, ca=self.issued.ca)

    def client(self) -> ssl.SSLContext:
        """Context of the side that connects."""
        return client_context(certificate=self.issued.certificate, key=self.issued.key, ca=self.issued.ca)

    def client_without_certificate(self) -> ssl.SSLContext:
        """Trusts the same CA and shows nothing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.issued.ca)
        return context


@dataclass(frozen=True)
class Certificates:
    """One CA with its holders, and those who should get nowhere."""

    agent: Holder  # of AGENT_NAME
    other_agent: Holder  # of kvm2.test
    coordinator: Holder
    expired_agent: Holder
    expired_coordinator: Holder
    foreign_agent: Holder  # of AGENT_NAME, by another CA, trusting that one
    foreign_coordinator: Holder


def make_certificates(folder: Path) -> Certificates:
    """All of them, in sub-folders of `folder`."""
    home, abroad = folder / "home", folder / "abroad"
    pki.init_ca(home)
    pki.init_ca(abroad)
    agent, other = pki.issue_agent(home, AGENT_NAME), pki.issue_agent(home, "kvm2.test")
    coordinator = pki.issue_coordinator(home)
    past = folder / "past"  # the same CA, for other names of files
    shutil.copytree(home, past)
    for name in (AGENT_NAME, "coordinator"):
        (past / f"{name}.crt").unlink()
        (past / f"{name}.key").unlink()
    with mock.patch.object(pki, "LEAF_VALIDITY", -datetime.timedelta(minutes=1)):
        expired_agent, expired_coordinator = pki.issue_agent(past, AGENT_NAME), pki.issue_coordinator(past)
    return Certificates(
        agent=Holder(agent),
        other_agent=Holder(other),
        coordinator=Holder(coordinator),
        expired_agent=Holder(expired_agent),
        expired_coordinator=Holder(expired_coordinator),
        foreign_agent=Holder(pki.issue_agent(abroad, AGENT_NAME)),
        foreign_coordinator=Holder(pki.issue_coordinator(abroad)),
    )


def ranges(*pairs: tuple[int, int]) -> bytes:
    """Ranges (offset, length) as a payload."""
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


def block_payload(offset: int, data: bytes) -> tuple[bytes, bytes, bytes]:
    """The payload pieces of a raw `BlockData` of one range."""
    return ranges((offset, len(data))), blake3.blake3(data).digest(), data


def deliver(buffers: list[Buffer], to: Connection) -> list[Received]:
    """Feed one machine with what another gave; all events of it."""
    for buffer in buffers:
        to.feed(buffer)
    events = []
    while (event := to.next_event()) is not None:
        events.append(event)
    return events


HELLO = BulkHello(versions=(2,), software="test", grant="00" * 16, target="vda", digest_seed=7)


def span(batch: int, offset_bytes: int, length_bytes: int) -> tuple[CompareSpan, bytes]:
    """A `CompareSpan` that is data from end to end and one block a superblock, without details; with its payload."""
    message = CompareSpan(
        batch=batch,
        offset_bytes=offset_bytes,
        length_bytes=length_bytes,
        superblock_bytes=65536,
        detail_bytes=65536,
        count=1,
    )
    return message, ranges((offset_bytes, length_bytes)) + bytes(16 * -(-length_bytes // 65536))


def open_bulk(
    window_bytes: int = 4 * MIB, ahead_bytes: int = 4 * MIB, lanes: int = 2
) -> tuple[BulkConnection, BulkConnection]:
    """Source and target, past the handshake."""
    source, target = BulkConnection(Speaker.CALLER), BulkConnection(Speaker.LISTENER)
    deliver(source.send(HELLO), target)
    welcome = BulkWelcome(version=2, software="test", window_bytes=window_bytes, ahead_bytes=ahead_bytes, lanes=lanes)
    deliver(target.send(welcome), source)
    return source, target


def compare(
    *pairs: tuple[int, int],
    batch: int = 1,
    at: int = 0,
    length: int = MIB,
    superblock: int = BLOCK,
    detail: int = BLOCK,
    digests: int | None = None,
    count: int | None = None,
) -> tuple[CompareSpan, bytes]:
    """A question about the span of `length` bytes at `at` whose data are `pairs`; a digest for each by default."""
    message = CompareSpan(
        batch=batch,
        offset_bytes=at,
        length_bytes=length,
        superblock_bytes=superblock,
        detail_bytes=detail,
        count=len(pairs) if count is None else count,
    )
    return message, ranges(*pairs) + bytes(16 * (len(pairs) if digests is None else digests))


def answer(batch: int = 1, read: int = 0, details: int = 0) -> SpanAnswer:
    """An answer to that batch."""
    return SpanAnswer(batch=batch, read_bytes=read, details=details)


def violates(connection: BulkConnection, message: Message, payload: bytes, why: str) -> None:
    """The message kills the connection, for ever."""
    connection.feed(frame_prefix(encode(message), len(payload)) + payload)
    with pytest.raises(PeerViolation, match=why):
        connection.next_event()
    with pytest.raises(PeerViolation, match=why):
        connection.next_event()


def ask_nine(source: BulkConnection, target: BulkConnection) -> None:
    """A span of nine superblocks: eight of 128 KiB, one of 64; its details are its 17 blocks."""
    deliver(source.send(*compare((0, MIB), (2 * MIB, BLOCK), length=3 * MIB, superblock=2 * BLOCK, digests=9)), target)


@contextmanager
def refused(code: str) -> Iterator[None]:
    """The block ends with a refusal by the peer, of that code."""
    with pytest.raises(PeerEnded) as caught:
        yield
    assert caught.value.goodbye_code == code
