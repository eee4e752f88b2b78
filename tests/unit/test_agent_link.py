"""The way to the agents over real TLS on the loopback: errors name the host and the cure, connections come back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from coordinator.agents import NamingAgent, ask, open_agents
from coordinator.config import Config, HostConfig, PkiFiles
from coordinator.errors import AgentRefused, HostUnreachable, UsageError
from coordinator.model import VmRef
from coordinator.pki import init_ca, issue_agent, issue_coordinator
from protocol.channel import ProgressSink, serve_control
from protocol.messages import AskPower, Failure, PassReport, Power, PowerAnswer, Reply, Request
from protocol.tls import PeerIdentity, server_context

ANSWER = PowerAnswer(power=Power.OFF, images_free=True, holders=())


class House:
    """Certificates for a coordinator and for the agent ``prod``."""

    def __init__(self, folder: Path) -> None:
        init_ca(folder)
        agent, own = issue_agent(folder, "prod"), issue_coordinator(folder)
        self.server = server_context(certificate=agent.certificate, key=agent.key, ca=agent.ca)
        self.pki = PkiFiles(ca=own.ca, certificate=own.certificate, key=own.key)

    def config(self, port: int) -> Config:
        return Config(pki=self.pki, hosts={"prod": HostConfig(address="127.0.0.1", port=port)})

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[int]:
        async def answer(request: Request, _peer: PeerIdentity, _progress: ProgressSink) -> Reply:
            if isinstance(request, AskPower) and request.vm_uuid == "slow":
                await trio.sleep_forever()
            if isinstance(request, AskPower) and request.vm_uuid == "bad":
                raise LookupError
            return ANSWER

        def map_error(_error: Exception) -> Failure:
            facts: dict[str, str | int] = {"sentence": "odd", "code": 7, "vm": "bad"}
            return Failure(code="no-such-domain", sentence="no VM bad here", facts=facts)

        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            serve = partial(serve_control, listeners, self.server, answer, host="prod", map_error=map_error)
            nursery.start_soon(serve)
            try:
                yield listeners[0].socket.getsockname()[1]
            finally:
                nursery.cancel_scope.cancel()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "pki")


async def test_an_agent_is_asked_and_refuses_with_its_own_sentence(house: House) -> None:
    async with house.serving() as port, open_agents(house.config(port)) as agents:
        agent = agents.agent("prod")
        assert await ask(agent, AskPower(vm_uuid="u"), PowerAnswer) == ANSWER
        with pytest.raises(AgentRefused) as caught:
            await ask(agent, AskPower(vm_uuid="bad"), PowerAnswer)
        assert (caught.value.code, caught.value.sentence) == ("no-such-domain", "no VM bad here")
        assert caught.value.facts == {"sentence": "odd", "code": 7, "vm": "bad", "host": "prod"}


async def test_an_answer_of_another_kind_is_refused(house: House) -> None:
    async with house.serving() as port, open_agents(house.config(port)) as agents:
        with pytest.raises(AgentRefused, match="same version") as caught:
            await ask(agents.agent("prod"), AskPower(vm_uuid="u"), PassReport)
        assert caught.value.code == "unexpected-reply"


async def test_an_order_that_takes_too_long_says_so(house: House) -> None:
    async with house.serving() as port, open_agents(house.config(port)) as agents:
        with pytest.raises(AgentRefused, match="AskPower within") as caught:
            await ask(agents.agent("prod"), AskPower(vm_uuid="slow"), PowerAnswer, timeout_s=0.1)
        assert caught.value.code == "timed-out"


async def test_a_host_without_agent_is_named_with_the_cure(house: House) -> None:
    async with house.serving() as port:
        pass
    async with open_agents(house.config(port)) as agents:
        with pytest.raises(HostUnreachable, match="systemctl status failback-agent") as caught:
            await ask(agents.agent("prod"), AskPower(vm_uuid="u"), PowerAnswer)
        assert "prod (127.0.0.1 port" in caught.value.sentence


async def test_a_lost_connection_is_opened_again_at_the_next_question(house: House) -> None:
    async with house.serving() as port:
        pass
    async with open_agents(house.config(port)) as agents:
        agent = agents.agent("prod")
        async with house.serving(port):
            assert await ask(agent, AskPower(vm_uuid="u"), PowerAnswer) == ANSWER
        with pytest.raises(HostUnreachable):
            await ask(agent, AskPower(vm_uuid="u"), PowerAnswer)
        async with house.serving(port):
            with trio.fail_after(10):
                assert await ask(agent, AskPower(vm_uuid="u"), PowerAnswer) == ANSWER


async def test_missing_certificates_are_a_usage_error(tmp_path: Path) -> None:
    files = PkiFiles(ca=tmp_path / "ca.crt", certificate=tmp_path / "c.crt", key=tmp_path / "c.key")
    async with open_agents(Config(pki=files)) as agents:
        with pytest.raises(
            UsageError, match=r"c\.crt, .*c\.key are missing; `failback pki init` makes .* pki issue HOST`"
        ):
            await ask(agents.agent("prod"), AskPower(vm_uuid="u"), PowerAnswer)


async def test_a_damaged_certificate_is_named(house: House) -> None:
    house.pki.certificate.write_text("not PEM")
    async with open_agents(house.config(1)) as agents:
        with pytest.raises(UsageError, match=r"coordinator\.crt"):
            await ask(agents.agent("prod"), AskPower(vm_uuid="u"), PowerAnswer)


async def test_sentences_name_the_vm_and_not_its_uuid(house: House) -> None:
    async with house.serving() as port, open_agents(house.config(port)) as agents:
        agent = NamingAgent(agents.agent("prod"), VmRef(host="prod", name="web", uuid="bad"))
        with pytest.raises(AgentRefused) as caught:
            await ask(agent, AskPower(vm_uuid="bad"), PowerAnswer)
    assert caught.value.sentence == str(caught.value) == "no VM web here"
    assert caught.value.facts["vm"] == "bad"
