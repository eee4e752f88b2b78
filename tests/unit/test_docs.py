"""What the documents show is what the programs take."""

from __future__ import annotations

import re
import socket
from dataclasses import fields, replace
from pathlib import Path

import pytest

import agent.config
import coordinator.config
from coordinator.cli.plan_file import GROUP_KEYS, TOP_KEYS, parse_plan

REPOSITORY = Path(__file__).parents[2]


def _toml(begins: str) -> str:
    """The TOML block of docs/INSTALL.md that begins with that key."""
    blocks = re.findall(r"^```toml\n(.*?)^```", (REPOSITORY / "docs/INSTALL.md").read_text(), re.M | re.S)
    (found,) = [block for block in blocks if block.startswith(begins)]
    return str(found)


def test_the_agents_settings_in_install_are_all_there_and_the_defaults(tmp_path: Path) -> None:
    text = _toml("name")
    for key in ("ca.crt", "prod1.crt", "prod1.key"):
        (tmp_path / key).touch()
    file = tmp_path / "agent.toml"
    file.write_text(text.replace("/etc/failback/pki", str(tmp_path)))
    shown = agent.config.load(file)
    assert replace(shown, name=socket.gethostname()) == agent.config.Config(tls=shown.tls)
    for section in (
        agent.config.Config,
        agent.config.TlsConfig,
        agent.config.LibvirtConfig,
        agent.config.ScratchConfig,
    ):
        for field in fields(section):
            assert re.search(rf"^\[?{field.name}( =|\])", text, re.M), field.name


def test_the_coordinators_settings_in_install_are_all_there_and_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    text = _toml("state_dir")
    shown = coordinator.config.parse_config(text, "INSTALL.md")
    assert replace(shown, hosts={}) == coordinator.config.Config()
    assert shown.host("prod1").port == coordinator.config.HostConfig().port
    for section in (coordinator.config.Config, coordinator.config.PkiFiles, coordinator.config.HostConfig):
        for field in fields(section):
            assert re.search(rf"^\[?{field.name}( =|\]|\.)", text, re.M), field.name


def test_the_plan_in_fleet_is_one_that_is_taken() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", (REPOSITORY / "docs/FLEET.md").read_text(), re.M | re.S)
    plan = parse_plan(str(text), "FLEET.md", begins=True)
    assert plan.pairs == ("db1", "db2", "app1", "app2", "mon1")
    for key in (*TOP_KEYS, *GROUP_KEYS):
        assert re.search(rf"^\[*{key}( =|\]|\.)", text, re.M), key


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "protocol/SPEC.md"]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
