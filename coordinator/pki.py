"""A private certificate authority for agents and coordinators: what ``failback pki init`` and ``pki issue`` do.

A folder holds it all: ``ca.crt`` and ``ca.key``, and per holder ``NAME.crt`` and ``NAME.key``. Keys are made here, stay
in files only their owner may read, and are never overwritten. Certificates name their holder's role in a URI
(``urn:failback:role:agent``), agents their host names as well; ``protocol/SPEC.md`` says what is checked of them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.errors import CoordinatorError, UsageError
from protocol.messages import Role
from protocol.tls import ROLE_URI_PREFIX

CA_VALIDITY = datetime.timedelta(days=3653)
LEAF_VALIDITY = datetime.timedelta(days=731)
BACKDATED = datetime.timedelta(hours=1)
"""Certificates begin a little in the past: the clock of the host that gets one may be slow."""

CA_NAME = "ca"
COORDINATOR_NAME = "coordinator"

_HOST_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


class PkiError(CoordinatorError):
    """The certificate authority cannot be made, read or used."""

    code = "pki"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """What was written.

    Attributes:
        certificate, key: paths of the PEM files.
        ca: path of the CA's certificate, which belongs beside them on their host.
        fingerprint: SHA-256 of the certificate (DER), lower-case hex.
        not_after: end of its validity, UTC.
        names: DNS names and IP addresses in it.
    """

    certificate: Path
    key: Path
    ca: Path
    fingerprint: str
    not_after: datetime.datetime
    names: tuple[str, ...]


def init_ca(folder: Path) -> Issued:
    """Make the certificate authority in `folder` (created with mode 0700 if it is missing).

    Raises PkiError, also when there is one already.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _io_error("make the folder", folder, error) from error
    key = ec.generate_private_key(ec.SECP256R1())
    # The random part keeps two CAs apart that were made one after the other.
    name = _name(f"failback CA {secrets.token_hex(4)}")
    builder = (
        _builder(name, name, key.public_key(), CA_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    return _write(folder, CA_NAME, builder.sign(key, hashes.SHA256()), key, ())


def issue_agent(folder: Path, host: str, *, aliases: Sequence[str] = ()) -> Issued:
    """A certificate for the agent of `host`, good for listening and for connecting to other agents.

    Args:
        folder: where `init_ca` made the authority; the new files go there too.
        host: the name by which coordinators and other agents know the host (a DNS name, in lower case).
        aliases: more DNS names and IP addresses of it.

    Raises UsageError for a name that is none, PkiError for everything else.
    """
    if host in (CA_NAME, COORDINATOR_NAME):
        raise UsageError(f"an agent cannot be called {host!r}, whose files have that name already; use its full name")
    _check_host(host)
    names: list[x509.GeneralName] = [x509.DNSName(host)]
    for alias in aliases:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(alias)))
        except ValueError:
            _check_host(alias)
            names.append(x509.DNSName(alias))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _issue(folder, host, Role.AGENT, names, usages, (host, *aliases))


def issue_coordinator(folder: Path, name: str = COORDINATOR_NAME) -> Issued:
    """A certificate for a coordinator: good for connecting to agents, never for being one.

    `name` names its files. Raises UsageError for a name that is none, PkiError for everything else.
    """
    if name == CA_NAME:
        raise UsageError("a coordinator cannot be called 'ca', whose files have that name already; use another name")
    _check_host(name)
    return _issue(folder, name, Role.COORDINATOR, [], [ExtendedKeyUsageOID.CLIENT_AUTH], ())


def _issue(
    folder: Path,
    name: str,
    role: Role,
    alternatives: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    names: tuple[str, ...],
) -> Issued:
    ca, ca_key = _load_ca(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role.value)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )
    builder = (
        _builder(_name(name), ca.subject, key.public_key(), LEAF_VALIDITY, latest=ca.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([*alternatives, uri]), critical=False)
        .add_extension(authority, critical=False)
    )
    return _write(folder, name, builder.sign(ca_key, hashes.SHA256()), key, names)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    validity: datetime.timedelta,
    latest: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    not_after = now + validity if latest is None else min(now + validity, latest)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    # A common name holds 64 characters; the full name stands among the alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_host(host: str) -> None:
    if len(host) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in host.split(".")):
        raise UsageError(f"{host!r} is no host name; use lower-case letters, digits, hyphens and dots")


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = folder / f"{CA_NAME}.crt", folder / f"{CA_NAME}.key"
    path = certificate_path
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        path = key_path
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise PkiError(
            f"there is no certificate authority in {folder}: {path.name} is missing; `failback pki init` makes one"
        ) from error
    except OSError as error:
        raise _io_error("read", path, error) from error
    except (ValueError, TypeError) as error:
        raise PkiError(f"{path} is damaged or protected by a passphrase; restore it from its backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise PkiError(f"{key_path} is not the key of {certificate_path}; restore both from the same backup")
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise PkiError(
            f"the certificate authority in {folder} has expired; move the folder away, run `failback pki init`, "
            "and issue every host a new certificate"
        )
    return certificate, key


def _write(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, names: tuple[str, ...]
) -> Issued:
    certificate_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    for path in (key_path, certificate_path):
        if path.exists():
            raise _exists(path)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(key_path, pem, 0o600)
    try:
        _write_new(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except PkiError:
        key_path.unlink(missing_ok=True)  # ours, made a moment ago: alone it would be in the way of the next try
        raise
    return Issued(
        certificate=certificate_path,
        key=key_path,
        ca=folder / f"{CA_NAME}.crt",
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        not_after=certificate.not_valid_after_utc,
        names=names,
    )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole or not at all, durably, and never over another one."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # fails where rename would overwrite
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
        _sync_folder(path.parent)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise _io_error("write", path, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> PkiError:
    return PkiError(f"{path} exists already and is not overwritten; move it away first if it is no longer needed")


def _io_error(verb: str, path: Path, error: OSError) -> PkiError:
    return PkiError(f"cannot {verb} {path}: {(error.strerror or str(error)).lower()}; check the folder and its rights")
