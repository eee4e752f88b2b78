"""Certificates: what is in them, where the files go, and that no key is ever lost or seen."""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from coordinator import pki
from coordinator.errors import CoordinatorError, UsageError
from protocol.tls import certificate_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    pki.init_ca(folder)
    return folder


def _load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_authority_may_sign_and_nothing_else(folder: Path) -> None:
    ca = _load(folder / "ca.crt")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    ca.verify_directly_issued_by(ca)


def test_keys_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    before = os.umask(0)
    try:
        issued = [pki.init_ca(folder), pki.issue_agent(folder, "kvm1"), pki.issue_coordinator(folder)]
    finally:
        os.umask(before)
    assert _mode(folder) == 0o700
    assert [_mode(each.key) for each in issued] == [0o600] * 3
    assert [_mode(each.certificate) for each in issued] == [0o644] * 3
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.crt",
        "ca.key",
        "coordinator.crt",
        "coordinator.key",
        "kvm1.crt",
        "kvm1.key",
    ]


def test_an_agents_certificate_names_its_host_its_addresses_and_its_role(folder: Path) -> None:
    issued = pki.issue_agent(folder, "kvm1.example", aliases=["10.0.0.1", "fd00::1", "kvm1"])
    assert issued.names == ("kvm1.example", "10.0.0.1", "fd00::1", "kvm1")
    certificate = _load(issued.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["kvm1.example", "kvm1"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_address("fd00::1"),
    ]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:failback:role:agent"]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    certificate.verify_directly_issued_by(_load(folder / "ca.crt"))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_coordinators_certificate_is_for_asking_only(folder: Path) -> None:
    certificate = _load(pki.issue_coordinator(folder).certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:failback:role:coordinator"]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_the_key_belongs_to_the_certificate_and_the_report_to_both(folder: Path) -> None:
    issued = pki.issue_agent(folder, "kvm1")
    certificate = _load(issued.certificate)
    key = serialization.load_pem_private_key(issued.key.read_bytes(), password=None)
    assert key.public_key() == certificate.public_key()
    assert issued.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
    assert issued.fingerprint == certificate_fingerprint(issued.certificate)
    assert issued.not_after == certificate.not_valid_after_utc
    assert issued.ca == folder / "ca.crt"


def test_validity_begins_a_little_in_the_past_and_lasts_for_years(folder: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    year = datetime.timedelta(days=365)
    for path, years in ((folder / "ca.crt", 10), (pki.issue_agent(folder, "kvm1").certificate, 2)):
        certificate = _load(path)
        assert (
            now - datetime.timedelta(hours=2) < certificate.not_valid_before_utc < now - datetime.timedelta(minutes=50)
        )
        assert now + years * year < certificate.not_valid_after_utc < now + (years + 1) * year


def test_no_certificate_outlives_the_authority(tmp_path: Path) -> None:
    with mock.patch.object(pki, "CA_VALIDITY", datetime.timedelta(days=10)):
        ca = pki.init_ca(tmp_path)
    assert pki.issue_agent(tmp_path, "kvm1").not_after == ca.not_after


def test_openssl_finds_the_chain_good(folder: Path) -> None:
    agent, coordinator = pki.issue_agent(folder, "kvm1"), pki.issue_coordinator(folder)
    for issued, purpose in ((agent, "sslserver"), (agent, "sslclient"), (coordinator, "sslclient")):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(issued.ca)]
        subprocess.run([*command, str(issued.certificate)], check=True, capture_output=True)


@pytest.mark.parametrize("left", ["kvm1.key", "kvm1.crt"])
def test_nothing_is_overwritten_and_nothing_is_left_half_done(folder: Path, left: str) -> None:
    (folder / left).write_text("precious")
    before = sorted(folder.iterdir())
    with pytest.raises(CoordinatorError, match=rf"{left} exists already .* move it away") as caught:
        pki.issue_agent(folder, "kvm1")
    assert caught.value.code == "pki"
    assert (folder / left).read_text() == "precious"
    assert sorted(folder.iterdir()) == before


def test_a_second_authority_is_not_made_over_the_first(folder: Path) -> None:
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(CoordinatorError, match="exists already"):
        pki.init_ca(folder)
    assert (folder / "ca.key").read_bytes() == before


def test_a_file_that_appears_in_the_last_moment_is_not_overwritten(folder: Path) -> None:
    real = os.link

    def late(source: Path, destination: Path) -> None:
        destination.write_text("precious")
        real(source, destination)

    with mock.patch.object(os, "link", late), pytest.raises(CoordinatorError, match="exists already"):
        pki.issue_agent(folder, "kvm1")
    assert (folder / "kvm1.key").read_text() == "precious"
    assert not list(folder.glob(".*"))


def test_a_key_whose_certificate_could_not_be_written_is_not_left_in_the_way(folder: Path) -> None:
    real = os.link

    def full(source: Path, destination: Path) -> None:
        if destination.suffix == ".crt":
            raise OSError(28, "No space left on device")
        real(source, destination)

    with mock.patch.object(os, "link", full), pytest.raises(CoordinatorError, match="no space left"):
        pki.issue_agent(folder, "kvm1")
    assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "ca.key"]
    pki.issue_agent(folder, "kvm1")


@pytest.mark.parametrize(
    "host", ["", "KVM1", "a b", "-a", "a-", "a..b", "../x", "a/b", "a" * 64, "ä", "*.x", "a.b." * 90]
)
def test_a_name_that_is_none_is_a_usage_error(folder: Path, host: str) -> None:
    with pytest.raises(UsageError, match="is no host name"):
        pki.issue_agent(folder, host)
    with pytest.raises(UsageError):
        pki.issue_agent(folder, "kvm1", aliases=[host])
    assert not (folder / "kvm1.key").exists()


@pytest.mark.parametrize("host", ["ca", "coordinator"])
def test_an_agent_cannot_take_the_name_of_other_files(folder: Path, host: str) -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        pki.issue_agent(folder, host)


def test_a_long_host_name_stands_whole_among_the_names(folder: Path) -> None:
    host = ".".join(["a" * 60] * 3)
    names = (
        _load(pki.issue_agent(folder, host).certificate)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert names.get_values_for_type(x509.DNSName) == [host]


def test_without_an_authority_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="`failback pki init` makes one"):
        pki.issue_agent(tmp_path, "kvm1")


def test_a_damaged_authority_is_named(folder: Path) -> None:
    (folder / "ca.key").write_text("rubbish")
    with pytest.raises(CoordinatorError, match=r"ca\.key is damaged"):
        pki.issue_agent(folder, "kvm1")


def test_a_key_of_another_authority_is_noticed(folder: Path, tmp_path: Path) -> None:
    pki.init_ca(tmp_path / "other")
    (folder / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(CoordinatorError, match="is not the key of"):
        pki.issue_agent(folder, "kvm1")


def test_an_expired_authority_issues_nothing(tmp_path: Path) -> None:
    with mock.patch.object(pki, "CA_VALIDITY", datetime.timedelta(0)):
        pki.init_ca(tmp_path)
    with pytest.raises(CoordinatorError, match="has expired"):
        pki.issue_agent(tmp_path, "kvm1")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CoordinatorError, match=r"cannot make the folder .*file/pki"):
        pki.init_ca(tmp_path / "file" / "pki")
