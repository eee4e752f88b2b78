"""TLS as both kinds of connection use it: 1.3 only, our own CA only, certificates on both sides, roles in them."""

from __future__ import annotations

import hashlib
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConnectionLost, PeerViolation, ProtocolError, TlsFileError
from protocol.messages import Role

ROLE_URI_PREFIX = "urn:failback:role:"
"""A certificate names its role in a URI subject alternative name: this prefix and `Role`'s value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerIdentity:
    """Who the certificate of the other end says it is.

    Attributes:
        role: None when the certificate names no role, or more than one.
        names: its DNS names.
        fingerprint: SHA-256 of the certificate (DER), lower-case hex.
    """

    role: Role | None
    names: tuple[str, ...]
    fingerprint: str


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate in DER form, lower-case hex."""
    return hashlib.sha256(der).hexdigest()


def certificate_fingerprint(certificate: Path) -> str:
    """The fingerprint of the first certificate of a PEM file. Raises TlsFileError."""
    try:
        return fingerprint(ssl.PEM_cert_to_DER_cert(_first_certificate(certificate)))
    except (OSError, ValueError) as error:
        raise _file_error("certificate", certificate, error) from error


def _first_certificate(path: Path) -> str:
    text = path.read_text("ascii")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = text.find(begin)
    stop = text.find(end, start)
    if start < 0 or stop < 0:
        raise ValueError("it holds no PEM certificate")
    return text[start : stop + len(end)] + "\n"


def server_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """For the side that listens: the other side must show a certificate of that CA. Raises TlsFileError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # Connections live long and are few: a session ticket would only be one more secret to keep.
    context.num_tickets = 0
    return _load(context, certificate, key, ca)


def client_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """For the side that connects: checks the certificate's DNS name against the name asked for. Raises TlsFileError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    return _load(context, certificate, key, ca)


def _load(context: ssl.SSLContext, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    for what, path in (("certificate", certificate), ("private key", key), ("CA certificate", ca)):
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise _file_error(what, path, error) from error
    try:
        # A password callback that fails: an encrypted key must not make a daemon ask at a terminal.
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise _file_error(f"key {key} with the certificate", certificate, error) from error
    try:
        context.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        raise _file_error("CA certificate", ca, error) from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; use a key without a passphrase")


def _file_error(what: str, path: Path, error: Exception) -> TlsFileError:
    if isinstance(error, FileNotFoundError):
        cause = "there is no such file"
    elif isinstance(error, ssl.SSLError):
        cause = "the key does not belong to it" if error.reason == "KEY_VALUES_MISMATCH" else "it is not valid PEM"
    elif isinstance(error, OSError) and error.strerror:
        cause = error.strerror.lower()
    else:
        cause = str(error)
    return TlsFileError(f"cannot use the {what} {path}: {cause}; `failback pki issue HOST` makes certificates and keys")


def peer_identity(connection: ssl.SSLSocket | ssl.SSLObject) -> PeerIdentity:
    """Who is at the other end of a connection whose handshake is through."""
    der = connection.getpeercert(binary_form=True)
    parsed = connection.getpeercert()
    if not der or not parsed:
        raise PeerViolation("the peer showed no certificate")
    names: list[str] = []
    uris: list[str] = []
    alternatives: object = parsed.get("subjectAltName", ())
    assert isinstance(alternatives, tuple)
    for kind, value in alternatives:
        if kind == "DNS":
            names.append(value)
        elif kind == "URI" and value.startswith(ROLE_URI_PREFIX):
            uris.append(value.removeprefix(ROLE_URI_PREFIX))
    role = next((role for role in Role if uris == [role.value]), None)
    return PeerIdentity(role=role, names=tuple(names), fingerprint=fingerprint(der))


_VERIFICATION = {  # X509_V_ERR_* of OpenSSL, as ssl.SSLCertVerificationError.verify_code
    9: "is not valid yet (check both hosts' clocks)",
    10: "has expired; issue a new one with `failback pki issue`",
    18: "is self-signed, not issued by our CA",
    19: "comes from another CA; both hosts need certificates of the same `failback pki`",
    20: "comes from another CA; both hosts need certificates of the same `failback pki`",
    26: "is not meant for this use (a coordinator's certificate cannot serve as an agent's)",
    62: "is for another host name",
}

_ALERTS = {  # what the other end's alert means for us, by OpenSSL's reason
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires a certificate and we showed none",
    "TLSV1_ALERT_UNKNOWN_CA": "our certificate comes from a CA it does not know",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired; issue a new one with `failback pki issue`",
    "SSLV3_ALERT_BAD_CERTIFICATE": "our certificate is not acceptable to it",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "our certificate is not acceptable to it",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not meant for this use",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
}


def _cause(error: BaseException) -> BaseException | None:
    """The error of ssl or of a socket underneath what trio wraps around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLError) or (isinstance(seen, OSError) and seen.errno is not None):
            break
        if isinstance(seen, TimeoutError):
            break
        if isinstance(seen, BaseExceptionGroup):  # one for each address that was tried
            return _cause(seen.exceptions[0])
        seen = seen.__cause__ or seen.__context__
    return seen


def explain(error: BaseException, peer: str) -> ProtocolError:
    """What an error of a socket or of TLS means, in a sentence about `peer`.

    PeerViolation where the peer's certificate or bytes are at fault, ConnectionLost for everything else. Looks through
    the wrapping that trio puts around the cause.
    """
    seen = _cause(error)
    if isinstance(seen, ssl.SSLCertVerificationError):
        why = _VERIFICATION.get(seen.verify_code, f"is not acceptable: {seen.verify_message}")
        return PeerViolation(f"the certificate of {peer} {why}")
    if isinstance(seen, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return ConnectionLost(f"{peer} closed the connection")
    if isinstance(seen, ssl.SSLError):
        reason = getattr(seen, "reason", None) or "for no stated reason"
        if reason in _ALERTS:
            return ConnectionLost(f"{peer} refused the connection: {_ALERTS[reason]}")
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return PeerViolation(f"{peer} showed no certificate")
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL", "RECORD_LAYER_FAILURE"):
            return PeerViolation(f"{peer} does not speak TLS 1.3 there; is that the right port?")
        return PeerViolation(f"TLS with {peer} failed: {reason.replace('_', ' ').lower()}")
    if isinstance(seen, TimeoutError):
        return ConnectionLost(f"{peer} did not answer in time")
    if isinstance(seen, socket.gaierror):
        return ConnectionLost(f"the address of {peer} cannot be found: {seen.strerror}")
    if isinstance(seen, ConnectionRefusedError):
        return ConnectionLost(f"{peer} refuses connections there; is failback-agent running, and is that its port?")
    if isinstance(seen, OSError):
        return ConnectionLost(f"the connection with {peer} broke: {seen.strerror or seen}")
    return ConnectionLost(f"the connection with {peer} broke")
