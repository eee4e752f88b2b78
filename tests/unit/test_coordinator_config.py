"""The coordinator's configuration: defaults, what is read, and one clear sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import Config, HostConfig, default_state_dir, load_config, parse_config
from coordinator.errors import ExitCode, UsageError


def test_an_unknown_host_is_reached_by_its_own_name() -> None:
    assert Config().host("prod1") == HostConfig(address=None, port=9860, bulk_address=None, bulk_port=None)


def test_what_is_written_is_read() -> None:
    text = """
    state_dir = "/srv/failback"
    hook_timeout_s = 20
    [pki]
    ca = "/srv/pki/ca.crt"
    [hosts.prod1]
    address = "192.0.2.10"
    bulk_port = 7000
    """
    config = parse_config(text, "test.toml")
    assert config.database == Path("/srv/failback/registry.sqlite")
    assert config.hook_timeout_s == 20.0
    assert config.pki.ca == Path("/srv/pki/ca.crt")
    assert config.host("prod1") == HostConfig(address="192.0.2.10", bulk_port=7000)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("state_dir = 1", "absolute path at state_dir"),
        ('state_dir = "here"', "absolute path at state_dir"),
        ("colour = 'red'", "colour"),
        ("[hosts.a]\nport = 'x'", "whole number at hosts"),
        ("[hosts.a]\nport = true", "whole number at hosts"),
        ("[hosts.a]\nport = 70000", "port 70000; ports are 1 to 65535"),
        ("hook_timeout_s = -1", "seconds above 0"),
        ("hosts = 3", "hosts"),
        ("state_dir = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text, "test.toml")
    assert named in caught.value.sentence
    assert "test.toml" in caught.value.sentence
    assert caught.value.exit_code is ExitCode.USAGE


def test_the_argument_goes_before_the_environment(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("hook_timeout_s = 1")
    two.write_text("hook_timeout_s = 2")
    environment = {"FAILBACK_CONFIG": str(two)}
    assert load_config(one, environment).hook_timeout_s == 1
    assert load_config(None, environment).hook_timeout_s == 2


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no configuration file"):
        load_config(tmp_path / "missing.toml", {})


def test_users_keep_their_state_in_their_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    assert default_state_dir() == Path("/home/me/state/failback")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state_dir() == Path("/var/lib/failback")
