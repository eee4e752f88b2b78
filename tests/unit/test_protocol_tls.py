"""TLS contexts and what their errors mean."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives import serialization

from protocol.errors import ConnectionLost, PeerViolation, ProtocolError, TlsFileError
from protocol.tls import certificate_fingerprint, client_context, explain, server_context
from tests.unit.protocol_house import Certificates, make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


def test_only_tls_1_3_with_certificates_on_both_sides_and_no_tickets(certificates: Certificates) -> None:
    server, client = certificates.agent.server(), certificates.coordinator.client()
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert len(context.get_ca_certs()) == 1
    assert client.check_hostname
    assert server.num_tickets == 0


@pytest.mark.parametrize("which", ["certificate", "key", "ca"])
def test_a_missing_file_is_named(certificates: Certificates, tmp_path: Path, which: str) -> None:
    issued = certificates.agent.issued
    files = {"certificate": issued.certificate, "key": issued.key, "ca": issued.ca, which: tmp_path / "gone"}
    for make in (server_context, client_context):
        with pytest.raises(TlsFileError, match=r"gone: there is no such file; `failback pki issue HOST`"):
            make(**files)


@pytest.mark.parametrize("which", ["certificate", "key", "ca"])
def test_a_file_that_is_something_else_is_named(certificates: Certificates, tmp_path: Path, which: str) -> None:
    issued = certificates.agent.issued
    (tmp_path / "rubbish").write_text("rubbish")
    files = {"certificate": issued.certificate, "key": issued.key, "ca": issued.ca, which: tmp_path / "rubbish"}
    with pytest.raises(TlsFileError, match=r"rubbish.*is not valid PEM"):
        server_context(**files)


def test_a_key_of_another_certificate_is_noticed(certificates: Certificates) -> None:
    issued = certificates.agent.issued
    with pytest.raises(TlsFileError, match="does not belong to it"):
        server_context(certificate=issued.certificate, key=certificates.coordinator.issued.key, ca=issued.ca)


def test_an_encrypted_key_never_asks_at_the_terminal(certificates: Certificates, tmp_path: Path) -> None:
    issued = certificates.agent.issued
    key = serialization.load_pem_private_key(issued.key.read_bytes(), password=None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TlsFileError, match="without a passphrase"):
        server_context(certificate=issued.certificate, key=encrypted, ca=issued.ca)


def test_the_fingerprint_is_that_of_the_certificate(certificates: Certificates, tmp_path: Path) -> None:
    assert certificate_fingerprint(certificates.agent.issued.certificate) == certificates.agent.fingerprint
    (tmp_path / "rubbish").write_text("rubbish")
    with pytest.raises(TlsFileError, match="holds no PEM certificate"):
        certificate_fingerprint(tmp_path / "rubbish")
    with pytest.raises(TlsFileError, match="no such file"):
        certificate_fingerprint(tmp_path / "gone")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (TimeoutError("timed out"), ConnectionLost, "did not answer in time"),
        (ConnectionRefusedError(111, "Connection refused"), ConnectionLost, "is failback-agent running"),
        (ConnectionResetError(104, "Connection reset by peer"), ConnectionLost, "broke: Connection reset by peer"),
        (socket.gaierror(-2, "Name or service not known"), ConnectionLost, "cannot be found: Name or service"),
        (ssl.SSLEOFError(8, "EOF"), ConnectionLost, "closed the connection"),
        (ssl.SSLError(1, "[SSL: SOMETHING] x"), PeerViolation, "TLS with kvm1"),
        (trio.BrokenResourceError("x"), ConnectionLost, "broke"),
    ],
)
def test_errors_become_sentences_that_name_the_peer(error: Exception, kind: type[ProtocolError], sentence: str) -> None:
    explained = explain(error, "kvm1")
    assert type(explained) is kind
    assert sentence in explained.sentence
    assert "kvm1" in explained.sentence


def test_the_cause_is_found_under_what_trio_wraps_around_it() -> None:
    refused = ConnectionRefusedError(111, "Connection refused")
    outer = OSError("all attempts to connect to kvm1 failed")
    outer.__cause__ = ExceptionGroup("attempts", [refused, refused])
    assert "refuses connections" in explain(outer, "kvm1").sentence
    broken = trio.BrokenResourceError()
    broken.__cause__ = ConnectionResetError(104, "Connection reset by peer")
    assert "reset by peer" in explain(broken, "kvm1").sentence
