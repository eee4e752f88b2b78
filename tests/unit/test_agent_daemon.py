"""`failback-agent` as a process: what an administrator gets wrong is one sentence, and it ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.channel import open_control
from protocol.errors import RequestFailed
from protocol.messages import DescribeHost, Ping, Pong
from protocol.tls import client_context
from tests.lab.agent_process import PROGRAM, AgentProcess, Identity
from tests.lab.pki import LabPki

NOBODY = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"
PATCHED = "import sys, time; from agent import daemon, service; {patch}; sys.argv[0] = 'failback-agent'; daemon.main()"


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture
def pki(lab_folder: Path) -> LabPki:
    return LabPki(lab_folder / "pki")


@pytest.fixture
def agent_in(lab_folder: Path, pki: LabPki) -> Iterator[Callable[..., AgentProcess]]:
    made: list[AgentProcess] = []

    def make(*, uri: str = NOBODY, patch: str = "") -> AgentProcess:
        control, bulk = _free_ports()
        program = [sys.executable, "-c", PATCHED.format(patch=patch)] if patch else [str(PROGRAM)]
        agent = AgentProcess(
            "prod",
            lab_folder / "agent",
            pki.agent("prod"),
            uri=uri,
            control_port=control,
            bulk_port=bulk,
            program=program,
        )
        made.append(agent)
        return agent

    yield make
    for agent in made:
        if agent.running:
            agent.kill9()


def _events(agent: AgentProcess) -> list[str]:
    """What it logged; every line is JSON."""
    return [json.loads(line)["event"] for line in agent.log.read_text().splitlines()]


def _wait_for(agent: AgentProcess, event: str) -> None:
    deadline = time.monotonic() + 20
    while event not in _events(agent):
        assert time.monotonic() < deadline, agent.log.read_text()
        time.sleep(0.01)


async def test_without_libvirt_it_starts_says_so_and_answers(
    agent_in: Callable[..., AgentProcess], pki: LabPki
) -> None:
    agent = agent_in()
    agent.start()
    _wait_for(agent, "libvirt cannot be reached; requests fail until it can")
    me = pki.coordinator()
    context = client_context(certificate=me.certificate, key=me.key, ca=me.ca)
    async with open_control("127.0.0.1", agent.control_port, server_name="prod", context=context) as channel:
        assert await channel.ask(Ping(), timeout_s=10) == Pong()
        with pytest.raises(RequestFailed) as caught:
            await channel.ask(DescribeHost(), timeout_s=10)
    assert caught.value.code == "hypervisor-unreachable"
    assert "libvirtd" in caught.value.sentence
    assert agent.stop() == 0
    _events(agent)


def test_a_second_signal_does_not_cut_the_end_short(agent_in: Callable[..., AgentProcess]) -> None:
    patch = (
        "stop = service.AgentService.stop\n"
        "async def slowly(self):\n"
        "    import trio\n"
        "    await trio.sleep(1)\n"
        "    await stop(self)\n"
        "    service.log.info('ended in order')\n"
        "service.AgentService.stop = slowly\n"
    )
    agent = agent_in(patch=f"exec({patch!r})")
    agent.start()
    os.kill(agent.pid, signal.SIGTERM)
    _wait_for(agent, "stopping")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(agent.pid, number)
        _wait_for(agent, "stopping already")
    assert agent.stop() == 0
    assert "ended in order" in _events(agent)


def test_a_libvirt_that_hangs_keeps_it_neither_from_starting_nor_from_ending(
    agent_in: Callable[..., AgentProcess], lab_folder: Path
) -> None:
    path = lab_folder / "deaf"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen(8)
        agent = agent_in(uri=f"qemu+unix:///system?socket={path}", patch="daemon.STOP_WITHIN_S = 1.0")
        agent.start()
        deaf.settimeout(20)
        caller, _ = deaf.accept()  # the agent waits for an answer by now
        with caller:
            began = time.monotonic()
            assert agent.stop() == 1
            assert time.monotonic() - began < 10
    assert "storage or libvirt does not answer; ending without waiting for it" in _events(agent)


def _garbage(identity: Identity, _: dict[str, str]) -> None:
    identity.certificate.write_text("no certificate")


def _foreign_key(identity: Identity, _: dict[str, str]) -> None:
    other = LabPki(identity.key.parent / "other").agent("prod")
    identity.key.write_text(other.key.read_text())


def _no_ca(identity: Identity, _: dict[str, str]) -> None:
    identity.ca.write_text("")


def _runtime_is_a_file(identity: Identity, settings: dict[str, str]) -> None:
    settings["runtime_dir"] = str(identity.ca)


def _runtime_is_read_only(_: Identity, settings: dict[str, str]) -> None:
    settings["runtime_dir"] = "/proc/self"


def _runtime_is_long(identity: Identity, settings: dict[str, str]) -> None:
    settings["runtime_dir"] = str(identity.ca.parent / ("x" * 90))


def _state_is_a_file(identity: Identity, settings: dict[str, str]) -> None:
    settings["state_dir"] = str(identity.ca)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_garbage, "prod."),
        (_foreign_key, "prod.key"),
        (_no_ca, "ca."),
        (_runtime_is_a_file, "runtime_dir"),
        (_runtime_is_read_only, "runtime_dir"),
        (_runtime_is_long, "runtime_dir"),
        (_state_is_a_file, "state_dir"),
    ],
)
def test_what_it_cannot_start_with_is_one_sentence(
    agent_in: Callable[..., AgentProcess],
    spoil: Callable[[Identity, dict[str, str]], None],
    word: str,
) -> None:
    agent = agent_in()
    identity = _identity_of(agent)
    settings: dict[str, str] = {}
    spoil(identity, settings)
    lines = [line for line in agent.config.read_text().splitlines() if line.split(" = ")[0] not in settings]
    agent.config.write_text("\n".join([*(f"{key} = {json.dumps(value)}" for key, value in settings.items()), *lines]))
    said = _refusal(agent)
    assert word in said


def test_a_port_that_is_taken_is_one_sentence(agent_in: Callable[..., AgentProcess]) -> None:
    agent = agent_in()
    with socket.socket() as other:
        other.bind(("127.0.0.1", agent.bulk_port))
        other.listen()
        said = _refusal(agent)
    assert "bulk_port" in said
    assert str(agent.bulk_port) in said


def _identity_of(agent: AgentProcess) -> Identity:
    tls = tomllib.loads(agent.config.read_text())["tls"]
    return Identity(ca=Path(tls["ca"]), certificate=Path(tls["certificate"]), key=Path(tls["key"]))


def _refusal(agent: AgentProcess) -> str:
    """What it says before it ends."""
    done = subprocess.run(
        [str(PROGRAM), "--config", str(agent.config)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("failback-agent: ")
    return lines[0]
