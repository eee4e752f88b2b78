"""Two agents with real images and locks, passes between them over real TLS on loopback, in one process."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from agent.daemon import _accept_bulk
from agent.passes import Session
from protocol.messages import (
    AllowPass,
    AskEvidence,
    Direction,
    Evidence,
    Grant,
    GrantedDisk,
    OpenView,
    Order,
    PassKind,
    PassReport,
    RunPass,
    Side,
    TargetEvidence,
)
from tests.unit.agent_house import SIZE_BYTES, AgentHouse, Outcome, open_house, order
from tests.unit.protocol_house import AGENT_NAME, Certificates, make_certificates


@dataclass
class TwoAgents:
    """Source (beside the replica) and target (beside the original), both VMs off and fenced.

    Attributes:
        port: the target's for bulk connections.
        views: how many were opened.
    """

    source: AgentHouse
    target: AgentHouse
    certificates: Certificates
    port: int
    views: int = 0
    sessions: list[Session] = field(default_factory=list)

    async def evidence(self) -> TargetEvidence:
        """What the target's agent says of its disk."""
        told = await self.target.ask(AskEvidence(vm_uuid=self.target.vm.uuid, targets=("vda",)))
        assert isinstance(told, Evidence)
        return told.disks[0]

    async def run_pass(
        self,
        *,
        kind: PassKind = PassKind.SYNC,
        view: str | None = None,
        seed: int | None = None,
        source_seed: int | None = None,
    ) -> tuple[Outcome, Outcome]:
        """Open a view and run a pass of it: how it ended at the source and at the target.

        Args:
            kind: of the pass.
            view: its name, by default a new one.
            seed: granted; `source_seed`: told to the source, where that is another.
        """
        self.views += 1
        view = view or f"r1-{self.views}"
        authority = order()
        await self.source.ask(OpenView(order=authority, vm_uuid=self.source.vm.uuid, targets=("vda",), view=view))
        number = secrets.token_hex(16)
        for house, direction, peer, its_seed in (
            (self.target, Direction.RECEIVE, self.certificates.other_agent, seed),
            (self.source, Direction.SEND, self.certificates.agent, seed if source_seed is None else source_seed),
        ):
            grant = self._grant(house, number, direction, peer.fingerprint, view, its_seed, kind)
            await house.ask(AllowPass(order=authority, grant=grant))
        ends = Outcome(), Outcome()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ends[1].watch, lambda: self.target.ask(self._run(authority, number)))
                await ends[0].watch(lambda: self.source.ask(self._run(authority, number)))
                if ends[0].error is not None:
                    await self.target.service.passes.end(authority.pair)
        return ends

    async def must(self, **words: object) -> tuple[PassReport, PassReport]:
        """The reports of a pass that is complete."""
        ends = await self.run_pass(**words)  # type: ignore[arg-type]
        assert isinstance(ends[0].reply, PassReport), ends[0].error
        assert isinstance(ends[1].reply, PassReport), ends[1].error
        return ends[0].reply, ends[1].reply

    async def refence(self) -> None:
        """As when the original ran meanwhile: its fence is lifted, and it is fenced again."""
        fences = self.target.service.fences
        fences.lift(self.target.vm.uuid, pair="web", restore_autostart=False)
        await self.target.fence(Side.ORIGINAL)

    def _grant(
        self,
        house: AgentHouse,
        number: str,
        direction: Direction,
        peer: str,
        view: str,
        seed: int | None,
        kind: PassKind,
    ) -> Grant:
        disk = GrantedDisk(
            target="vda",
            peer_target="vda",
            source_size_bytes=SIZE_BYTES,
            target_size_bytes=SIZE_BYTES,
            digest_seed=seed,
        )
        return Grant(
            grant=number,
            vm_uuid=house.vm.uuid,
            direction=direction,
            peer_fingerprint=peer,
            view=view,
            disks=(disk,),
            kind=kind,
        )

    def _run(self, authority: Order, number: str) -> RunPass:
        return RunPass(order=authority, grant=number, peer_name=AGENT_NAME, peer_host="127.0.0.1", peer_port=self.port)


@asynccontextmanager
async def open_two_agents(folder: Path) -> AsyncIterator[TwoAgents]:
    """Both, and the target's listener."""
    certificates = make_certificates(folder / "pki")
    with ExitStack() as stack:
        for name in ("dr", "prod"):
            (folder / name).mkdir()
        source, target = (stack.enter_context(open_house(folder / name)) for name in ("dr", "prod"))
        source.service.runner.client_context = certificates.other_agent.client()
        await source.fence(Side.REPLICA)
        await target.fence(Side.ORIGINAL)
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            async with listener:
                nursery.start_soon(_accept_bulk, target.service, listener, certificates.agent.server())
                port = listener.socket.getsockname()[1]
                yield TwoAgents(source, target, certificates, port)
                await source.service.stop()
                await target.service.stop()
                nursery.cancel_scope.cancel()
