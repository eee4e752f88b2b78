"""`failback-agent check` without libvirt: each line says what is wrong and what mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import checkup, fence_install
from agent.config import Config, LibvirtConfig, TlsConfig
from agent.daemon import main
from agent.fence_install import HookError, hook_path, hook_state, hook_text, install, remove
from protocol.messages import HookState
from tests.lab.pki import LabPki

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    identity = LabPki(tmp_path / "pki").agent("prod")
    (tmp_path / "state").mkdir()
    (tmp_path / "etc").mkdir()
    return Config(
        tls=TlsConfig(ca=identity.ca, certificate=identity.certificate, key=identity.key),
        name="prod",
        state_dir=tmp_path / "state",
        runtime_dir=tmp_path / "run",
        libvirt=LibvirtConfig(
            uri=f"qemu+unix:///system?socket={tmp_path}/run/libvirt/sock",
            scratch_dir=tmp_path,
            hook_dir=tmp_path / "etc/hooks/qemu.d",
        ),
    )


def _file(config: Config, folder: Path) -> Path:
    path = folder / "agent.toml"
    tls, libvirt = config.tls, config.libvirt
    path.write_text(
        f'name = "prod"\nstate_dir = "{config.state_dir}"\nruntime_dir = "{config.runtime_dir}"\n'
        f'[tls]\nca = "{tls.ca}"\n'
        f'certificate = "{tls.certificate}"\nkey = "{tls.key}"\n[libvirt]\nuri = "{libvirt.uri}"\n'
        f'scratch_dir = "{libvirt.scratch_dir}"\nhook_dir = "{libvirt.hook_dir}"\n'
    )
    return path


@pytest.mark.parametrize(
    ("days", "well", "words"),
    [(-1, False, "expired on"), (10, False, "expires on"), (400, True, "good until")],
)
def test_certificates_are_told_of_before_they_expire(days: int, well: bool, words: str) -> None:
    result = checkup._expiry(Path("/x.crt"), NOW + timedelta(days=days), NOW, "prod", is_ca=False)
    assert result.well is well
    assert words in result.what
    assert well or "`failback pki issue prod`" in result.what


def test_every_line_of_a_host_without_libvirt_and_agent(config: Config, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--config", str(_file(config, tmp_path)), "check"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok    ", "WRONG ")) for line in lines)
    for words in (
        "WRONG libvirt: Cannot connect",
        "certificate",
        "image locks work in",
        "WRONG fence hook: not installed; `failback-agent fence install`",
        "WRONG the agent does not run",
    ):
        assert words in done.stdout, done.stdout


def test_the_hook_is_told_to_be_missing_installed_or_outdated(config: Config) -> None:
    assert hook_state(config) is HookState.MISSING
    path = hook_path(config)
    path.parent.mkdir(parents=True)
    path.write_text(hook_text(config))
    assert hook_state(config) is HookState.OUTDATED  # nobody may execute it
    path.chmod(0o755)
    assert hook_state(config) is HookState.INSTALLED
    assert repr(str(config.state_dir)) in path.read_text()
    path.write_text("#!/bin/sh\n")
    assert hook_state(config) is HookState.OUTDATED
    assert remove(config)
    assert not remove(config)


@pytest.mark.parametrize(
    ("uri", "words"), [("qemu:///embed?root=/x", "embedded"), ("qemu:///session", "one user's libvirt")]
)
def test_where_there_can_be_no_hook_install_says_so(config: Config, uri: str, words: str) -> None:
    other = replace(config, libvirt=replace(config.libvirt, uri=uri))
    assert hook_state(other) is HookState.IMPOSSIBLE
    with pytest.raises(HookError, match=words):
        install(other)
    assert not hook_path(other).exists()
    assert checkup._hook(other, libvirt_answers=True).well


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (lambda name: None, "does not call"),
        (lambda name: "no emulator", "not by the hook: no emulator"),
        (lambda name: f"hook: the VM {name} must not start", ""),
    ],
    ids=["started", "another-reason", "refused"],
)
def test_a_hook_is_proven_only_by_its_own_words(
    config: Config, monkeypatch: pytest.MonkeyPatch, answers: Callable[[str], str | None], words: str
) -> None:
    monkeypatch.setattr(fence_install, "refusal_of_probe", lambda _uri, name, _uuid: answers(name))
    if words:
        with pytest.raises(HookError, match=words):
            fence_install.prove(config)
    else:
        assert "refused to start the fenced probe" in fence_install.prove(config)
    assert not (config.state_dir / "fence-probe.json").exists()


def test_a_list_that_lacks_a_fence_is_told_of(config: Config) -> None:
    (config.state_dir / "ledger.json").write_text('{"fences": [{"vm_uuid": "u1"}]}')
    assert "missing" in fence_install.unlisted(config)
    (config.state_dir / "fenced.json").write_text('{"fences": []}')
    assert "lacks the fenced u1" in fence_install.unlisted(config)
    (config.state_dir / "fenced.json").write_text('{"fences": [{"vm_uuid": "u1"}]}')
    assert fence_install.unlisted(config) == ""


def test_a_lift_needs_a_reason_and_a_fence(config: Config, tmp_path: Path) -> None:
    file = str(_file(config, tmp_path))
    assert CliRunner().invoke(main, ["--config", file, "fence", "lift", "web"]).exit_code == 2
    assert CliRunner().invoke(main, ["--config", file, "fence", "lift", "web", "--reason", " "]).exit_code == 2
    done = CliRunner().invoke(main, ["--config", file, "fence", "lift", "web", "--reason", "x"])
    assert done.exit_code == 1
    assert "no VM web is fenced" in done.stderr
    assert "no VM is fenced" in CliRunner().invoke(main, ["--config", file, "fence", "list"]).stdout
