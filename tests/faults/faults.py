"""The faults: how each strikes while the verb stands still at a boundary, and how the world is mended after it.

A fault strikes, the verb goes on, and then the world does what it does by itself: systemd starts a killed daemon again,
a link comes back. What only a person can do is part of the recovery (`tests.faults.recovery`).
"""

from __future__ import annotations

import os
import resource
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from tests.faults.boundaries import Boundary, Way
from tests.faults.rig import Rig
from tests.faults.verbs import Verb
from tests.lab.agent_process import AgentProcess
from tests.lab.private_host import HostError, PrivateHost
from tests.lab.site import LabVm

AWAY_S = 2.0
"""How long what is only gone for a while is gone."""
ALTERED_OFFSET, ALTERED_BYTES = 5 << 20, 4096
REFUSED = 3
"""Exit code of the command."""
FIRST_OF_SWITCHOVER = "replica_off"


class Fault(ABC):
    """One fault.

    Attributes:
        name: a word for the command line; `words`: for people.
        ends_verb: the verb ends with it.
        leaves_damage: the pair's images are not for another cell.
    """

    name: str
    words: str
    ends_verb = False
    leaves_damage = False

    def applies(self, boundary: Boundary) -> bool:
        """Whether it means anything there."""
        return True

    @abstractmethod
    def strike(self, rig: Rig, verb: Verb) -> str:
        """Do it; what there is to tell of it."""

    def mend(self, rig: Rig) -> None:
        """What the world does by itself, while the verb goes on: nothing, of most that a kill ends."""
        return


class KillCoordinator(Fault):
    """The process that works on the run."""

    name = "kill-coordinator"
    words = "kill -9 of the coordinator"
    ends_verb = True

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Nothing of it goes on."""
        verb.kill()
        return ""


class KillAgent(Fault):
    """An agent, which its supervisor starts again."""

    def __init__(self, role: str, agent: Callable[[Rig], AgentProcess]) -> None:
        self.name = f"kill-{role}-agent"
        self.words = f"kill -9 of the {role} agent, which systemd starts again"
        self._agent = agent

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Its libvirt jobs and servers stay, or go, as they do."""
        self._agent(rig).kill9()
        return ""

    def mend(self, rig: Rig) -> None:
        """A new process on the same state."""
        self._agent(rig).start()


class FreezeAgent(Fault):
    """An agent that stands still for a while: SIGSTOP, later SIGCONT."""

    def __init__(self, role: str, agent: Callable[[Rig], AgentProcess]) -> None:
        self.name = f"freeze-{role}-agent"
        self.words = f"the {role} agent stands still for {AWAY_S:.0f} s (SIGSTOP)"
        self._agent = agent

    def strike(self, rig: Rig, verb: Verb) -> str:
        """It keeps its connections and answers nothing."""
        self._agent(rig).freeze()
        return ""

    def mend(self, rig: Rig) -> None:
        """It wakes up and finds what it was told meanwhile."""
        _pass_time()
        self._agent(rig).thaw()


class KillLibvirtd(Fault):
    """libvirtd of one host, which its supervisor starts again; its VMs go on."""

    def __init__(self, role: str, host: Callable[[Rig], PrivateHost]) -> None:
        self.name = f"kill-{role}-libvirtd"
        self.words = f"kill -9 of libvirtd beside the {role} agent, which systemd starts again"
        self._host = host

    def strike(self, rig: Rig, verb: Verb) -> str:
        """The agent's connection to it is gone."""
        self._host(rig).stop_libvirtd(kill=True)
        return ""

    def mend(self, rig: Rig) -> None:
        """It finds its VMs again."""
        self._host(rig).start_libvirtd()


class CutLink(Fault):
    """No packet passes between one host and the others for a while."""

    def __init__(self, role: str, verdict: str, host: Callable[[Rig], PrivateHost]) -> None:
        self.name = f"{verdict.lower()}-{role}-link"
        how = "swallows" if verdict == "DROP" else "refuses"
        self.words = f"a firewall {how} every packet of the {role} host for {AWAY_S:.0f} s (iptables {verdict})"
        self._verdict = verdict
        self._host = host

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Both directions."""
        self._rules(rig, "-I")
        return ""

    def mend(self, rig: Rig) -> None:
        """The rules go."""
        _pass_time()
        self._rules(rig, "-D")

    def _rules(self, rig: Rig, verb: str) -> None:
        for chain, direction in (("INPUT", "-i"), ("OUTPUT", "-o")):
            words = ["iptables", verb, chain, direction, "eth0", "-j", self._verdict]
            done = self._host(rig).run(words)
            assert done.returncode == 0, done.stderr


class KillQemu(Fault):
    """The QEMU of whichever VM of the pair runs."""

    name = "kill-qemu"
    words = "kill -9 of the QEMU that runs, the replica's or the original's; of every qemu-nbd where neither runs"

    def strike(self, rig: Rig, verb: Verb) -> str:
        """As a power cut would end it."""
        for vm in (rig.pair.replica, rig.pair.original):
            if rig.runs(vm):
                vm.host.kill_qemu(vm.name)
                rig.wait_until(lambda vm=vm: not rig.runs(vm), f"{vm.name} does not die")  # type: ignore[misc]
                return f"the {'replica' if vm is rig.pair.replica else 'original'} died"
        killed = 0
        for host in (rig.site.production, rig.site.dr):
            servers = host.run(["pgrep", "-x", "qemu-nbd"]).stdout.split()
            host.run(["kill", "-KILL", *servers])
            killed += len(servers)
        return f"neither ran; {killed} qemu-nbd killed"


class StartByHand(Fault):
    """Somebody starts a VM with virsh."""

    def __init__(self, side: str, vm: Callable[[Rig], LabVm]) -> None:
        self.name = f"start-{side}"
        self.words = f"`virsh start` of the {side} by hand"
        self._side = side
        self._vm = vm

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Refused by its fence, or not."""
        vm = self._vm(rig)
        if rig.runs(vm):
            return "it ran already"
        rig.watch.excused = True
        try:
            vm.host.virsh("start", vm.name)
        except HostError as refused:
            rig.watch.excused = False
            # QEMU may end before libvirt reads why, and the message is another one then.
            if "lock" not in str(refused) and not rig.is_fenced(vm):
                raise
            return "refused by its fence"
        assert not rig.is_fenced(vm), f"{vm.name} started though it is fenced"
        return "it started"


class PauseGuest(Fault):
    """The guest executes nothing, so it never answers a shutdown request."""

    name = "deaf-guest"
    words = "the replica's guest hears no shutdown request (virsh suspend)"

    def applies(self, boundary: Boundary) -> bool:
        """Where it is asked to shut down."""
        return boundary.way is Way.RUN and boundary.step == FIRST_OF_SWITCHOVER and boundary.side == "before"

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Paused."""
        replica = rig.pair.replica
        replica.host.virsh("suspend", replica.name)
        return ""

    def mend(self, rig: Rig) -> None:
        """Somebody lets it go on, too late."""
        _pass_time()
        replica = rig.pair.replica
        replica.host.run(["virsh", "-c", "qemu:///system", "resume", replica.name])


class SecondCoordinator(Fault):
    """Somebody resumes the run that a process works on."""

    name = "second-coordinator"
    words = "a second coordinator resumes the run while the first one stands still"

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Refused."""
        second = rig.verbs.run("resume", "--foreground", rig.pair.name)
        assert second.code == REFUSED, f"`failback resume` ended with {second.code}: {second.sentence()}"
        return f"refused: “{second.sentence()}”"


class NoMoreBytes(Fault):
    """Every write of a process to a file fails for a while (RLIMIT_FSIZE), those to disks and to its own state."""

    def __init__(self, role: str, agent: Callable[[Rig], AgentProcess]) -> None:
        self.name = f"unwritable-{role}"
        self.words = f"every write of the {role} agent to any file fails for {AWAY_S:.0f} s (EFBIG)"
        self._agent = agent

    def strike(self, rig: Rig, verb: Verb) -> str:
        """What it starts from now on can write no more than it."""
        _limit_files(self._agent(rig).pid, 0)
        return ""

    def mend(self, rig: Rig) -> None:
        """There is room again; an agent that could not even write its log and ended is started again."""
        _pass_time()
        agent = self._agent(rig)
        if agent.running:
            _limit_files(agent.pid, resource.RLIM_INFINITY)
        else:
            agent.start()


class UnwritableJournal(Fault):
    """Every write of the coordinator fails from here on."""

    name = "unwritable-journal"
    words = "the journal cannot be written any more by the process that works on the run (EFBIG)"

    def strike(self, rig: Rig, verb: Verb) -> str:
        """As a full disk does; the next process finds room."""
        _limit_files(verb.pid, 0)
        return ""


class AlterOriginal(Fault):
    """The original's storage does not hold any more what was written to it."""

    name = "altered-original"
    words = "a block of the original's disk changes under the target agent, its times as before"
    PLACES = ("close_view:1", "replica_off", "open_last_view", "last_pass")
    leaves_damage = True

    def applies(self, boundary: Boundary) -> bool:
        """Until the storage has been read whole (--verify full)."""
        before = boundary.step == "verify_full" and boundary.side == "before"
        return boundary.way is Way.RUN and (boundary.step in self.PLACES or before)

    def strike(self, rig: Rig, verb: Verb) -> str:
        """Behind everybody's back."""
        raw = rig.pair.original.disks[1].path
        times = raw.stat()
        with raw.open("r+b") as file:
            file.seek(ALTERED_OFFSET)
            before = file.read(ALTERED_BYTES)
            file.seek(ALTERED_OFFSET)
            file.write(bytes(byte ^ 0xFF for byte in before))
        os.utime(raw, ns=(times.st_atime_ns, times.st_mtime_ns))
        return ""


class LoseBitmaps(Fault):
    """What recorded the replica's writes is deleted by hand."""

    name = "lost-bitmaps"
    words = "the replica's checkpoints and their bitmaps are deleted by hand (virsh checkpoint-delete)"
    PLACES = ("pass:1", "close_view:1", "drop_checkpoints:1", "replica_off")

    def applies(self, boundary: Boundary) -> bool:
        """While the replica serves, and something is recorded."""
        return boundary.step in self.PLACES and boundary.way is Way.RUN

    def strike(self, rig: Rig, verb: Verb) -> str:
        """A backup job that uses them does not let go of them."""
        replica = rig.pair.replica
        names = replica.host.virsh("checkpoint-list", replica.name, "--name").split()
        gone = 0
        for name in names:
            done = replica.host.run(["virsh", "-c", "qemu:///system", "checkpoint-delete", replica.name, name])
            gone += done.returncode == 0
        return f"{gone} of {len(names)} deleted"


def _limit_files(pid: int, size_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def _pass_time() -> None:
    """What is gone for a while is gone for that long."""
    threading.Event().wait(AWAY_S)


def _source(rig: Rig) -> AgentProcess:
    return rig.source


def _target(rig: Rig) -> AgentProcess:
    return rig.target


def _dr(rig: Rig) -> PrivateHost:
    return rig.site.dr


def _production(rig: Rig) -> PrivateHost:
    return rig.site.production


FAULTS: tuple[Fault, ...] = (
    KillCoordinator(),
    KillAgent("source", _source),
    KillAgent("target", _target),
    KillQemu(),
    KillLibvirtd("source", _dr),
    KillLibvirtd("target", _production),
    FreezeAgent("source", _source),
    FreezeAgent("target", _target),
    CutLink("source", "DROP", _dr),
    CutLink("target", "REJECT", _production),
    StartByHand("original", lambda rig: rig.pair.original),
    StartByHand("replica", lambda rig: rig.pair.replica),
    PauseGuest(),
    SecondCoordinator(),
    UnwritableJournal(),
    NoMoreBytes("source", _source),
    NoMoreBytes("target", _target),
    AlterOriginal(),
    LoseBitmaps(),
)
"""In the order of docs/FAULTS.md."""
