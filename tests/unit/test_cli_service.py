"""Handing over to systemd, with a systemctl of the test's own on the PATH; and the unit files themselves."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from coordinator.cli.service import ServiceFailed, Systemd, unit_of
from coordinator.cli.session import Session
from coordinator.config import ENVIRONMENT
from coordinator.errors import ExitCode
from tests.unit.cli_house import Command

UNITS = Path(__file__).parents[2] / "systemd"


class FakeSystemctl:
    """A systemctl that writes down what it was asked and answers as told."""

    def __init__(self, folder: Path) -> None:
        self.runtime_dir = folder / "run-systemd"
        self.runtime_dir.mkdir()
        self._calls = folder / "calls"
        self._program = folder / "bin" / "systemctl"
        self._program.parent.mkdir()
        self.answers()

    @property
    def path(self) -> str:
        """The PATH to find it by."""
        return f"{self._program.parent}{os.pathsep}{os.environ['PATH']}"

    def answers(self, **codes: int) -> None:
        """Exit codes by verb; 0 for every other."""
        cases = "".join(
            f"{verb.replace('_', '-')}) echo '{verb} said no' >&2; exit {codes[verb]};;\n" for verb in codes
        )
        self._program.write_text(f'#!/bin/sh\necho "$@" >> {self._calls}\ncase "$1" in\n{cases}esac\n')
        self._program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What it was asked, in order."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystemctl:
    fake = FakeSystemctl(tmp_path)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return fake


def test_without_systemd_no_run_is_handed_over(tmp_path: Path, systemctl: FakeSystemctl) -> None:
    assert Systemd(tmp_path / "absent").why_unusable() == "systemd does not run here"
    assert systemctl.calls == []


def test_without_the_unit_no_run_is_handed_over(systemctl: FakeSystemctl) -> None:
    systemctl.answers(cat=1)
    assert Systemd(systemctl.runtime_dir).why_unusable() == "the unit failback@.service is not installed"


def test_without_systemctl_no_run_is_handed_over(systemctl: FakeSystemctl) -> None:
    assert Systemd(systemctl.runtime_dir, "no-such-systemctl").why_unusable() == "there is no no-such-systemctl"


def test_the_unit_of_the_pair_is_started_without_waiting_and_after_an_earlier_failure(systemctl: FakeSystemctl) -> None:
    systemctl.answers(reset_failed=1)
    systemd = Systemd(systemctl.runtime_dir)
    assert systemd.why_unusable() is None
    systemd.start("web1")
    assert systemctl.calls[1:] == ["reset-failed failback@web1.service", "start --no-block failback@web1.service"]


def test_a_unit_that_systemd_does_not_start_is_told_with_its_words_and_the_way_on(systemctl: FakeSystemctl) -> None:
    systemctl.answers(start=1)
    with pytest.raises(ServiceFailed) as caught:
        Systemd(systemctl.runtime_dir).start("web1")
    assert caught.value.exit_code is ExitCode.FAILED
    assert "start said no" in caught.value.sentence
    assert "failback resume web1 --foreground" in caught.value.sentence


def test_a_configuration_of_its_own_keeps_the_run_in_this_process(
    tmp_path: Path, systemctl: FakeSystemctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    systemd = Systemd(systemctl.runtime_dir)
    assert Session(systemd=systemd).why_not_systemd() is None
    assert "default configuration" in str(Session(systemd=systemd, config_file=tmp_path / "x").why_not_systemd())
    assert "default configuration" in str(Session(systemd=systemd, state_dir=tmp_path).why_not_systemd())
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "x"))
    assert "default configuration" in str(Session(systemd=systemd).why_not_systemd())
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in str(Session(systemd=systemd).why_not_systemd())


def test_start_here_says_why_it_does_not_hand_over(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.register()
    result = command("start", "web", "--yes")
    assert result.exit_code == 0
    assert "Working in this process" in result.stdout


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


def test_the_runs_unit_resumes_and_does_not_repeat_what_repeating_cannot_mend() -> None:
    service = unit("failback@.service")["Service"]
    assert service["ExecStart"].endswith("failback resume %i --unit")
    assert service["Restart"] == "on-failure"
    codes = (ExitCode.USAGE, ExitCode.REFUSED, ExitCode.NEEDS_OPERATOR)
    assert service["RestartPreventExitStatus"].split() == [str(int(code)) for code in codes]
    assert unit_of("web1") == "failback@web1.service"


def test_unfinished_runs_are_resumed_at_boot_and_the_agent_tells_that_it_is_ready() -> None:
    assert unit("failback-resume.service")["Service"]["ExecStart"].endswith("failback resume --all-unfinished")
    assert unit("failback-resume.service")["Install"]["WantedBy"] == "multi-user.target"
    agent = unit("failback-agent.service")["Service"]
    assert agent["Type"] == "notify"
    assert agent["ExecStart"].endswith("failback-agent --config /etc/failback/agent.toml")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the package systemd")
def test_systemd_finds_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    for file in UNITS.glob("*.service"):
        shutil.copy(file, tmp_path / file.name.replace("@.", "@web1."))
    shutil.copy(UNITS / "failback@.service", tmp_path)
    files = sorted(str(file) for file in tmp_path.glob("*.service") if "@." not in file.name)
    done = subprocess.run(
        ["systemd-analyze", "verify", *files], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
