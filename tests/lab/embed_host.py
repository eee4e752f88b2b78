"""A process that holds an embedded hypervisor and obeys orders about its guests.

For preparing and for checking a host while no agent runs on it: a root belongs to one process at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import embed

END_TIMEOUT_S = 20.0


class EmbedHostError(AssertionError):
    """An order failed."""


class EmbedHost:
    """The process; a context manager. At its end it kills the guests that still run, unless `keep_guests`.

    Args:
        root: folder of the embedded root, made when missing.
        keep_guests: leave guests running for the root's next process.
        shutdown_timeout_s: how long a guest may take to power off.
    """

    def __init__(self, root: Path, *, keep_guests: bool = False, shutdown_timeout_s: float = 60.0) -> None:
        self.root = root
        self._keep_guests = keep_guests
        self._shutdown_timeout_s = shutdown_timeout_s
        self._uri = embed.embed_root(root)

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "tests.lab.embed_host", self._uri, str(self._shutdown_timeout_s)]
        repository = Path(__file__).parents[2]
        with (self.root / "host.log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        if not self._keep_guests:
            embed.end_guests(self.root)

    def define(self, xml: str) -> None:
        """Define a persistent domain."""
        file = self.root / "domain.xml"
        file.write_text(xml)
        self._order("define", str(file))

    def start(self, name: str) -> None:
        """Start a domain."""
        self._order("start", name)

    def shut_down(self, name: str) -> None:
        """Press its power button; returns when it is off."""
        self._order("shutdown", name)

    def destroy(self, name: str) -> None:
        """Pull its plug."""
        self._order("destroy", name)

    def _order(self, *words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if answer != "done":
            log = (self.root / "host.log").read_text(errors="replace")[-2000:]
            raise EmbedHostError(f"{' '.join(words)}: {answer or 'the host has ended'}\n{log}")


def _obey(uri: str, shutdown_timeout_s: float) -> None:
    import libvirt

    libvirt.virEventRegisterDefaultImpl()

    def events() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=events, daemon=True).start()
    connection = libvirt.open(uri)
    stopped = threading.Condition()

    def lifecycle(*_event: object) -> None:
        with stopped:
            stopped.notify_all()

    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)

    def obey(order: str, argument: str) -> str:
        if order == "define":
            connection.defineXML(Path(argument).read_text())
            return "done"
        domain = connection.lookupByName(argument)
        {"start": domain.create, "shutdown": domain.shutdown, "destroy": domain.destroy}[order]()
        with stopped:
            if order == "start" or stopped.wait_for(lambda: not domain.isActive(), shutdown_timeout_s):
                return "done"
        return f"still running after {shutdown_timeout_s} s"

    for line in sys.stdin:
        try:
            answer = obey(*line.rstrip("\n").split("\t"))
        except libvirt.libvirtError as error:
            answer = str(error)
        print(answer.replace("\n", " "), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the event thread never ends by itself


if __name__ == "__main__":
    _obey(sys.argv[1], float(sys.argv[2]))
