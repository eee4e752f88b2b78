"""`failback-agent` as a process: its configuration, its start until it says it is ready, its end by either signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.private_host import PrivateHost

PROGRAM = Path(sys.executable).with_name("failback-agent")
READY_TIMEOUT_S = 120.0  # the first start of an embedded root probes QEMU
END_TIMEOUT_S = 30.0
CONTROL_PORT = 9860
BULK_PORT = 9861


class AgentError(AssertionError):
    """The agent did not start, or did not end."""


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM files that name a host (or the coordinator) to the others."""

    ca: Path
    certificate: Path
    key: Path


class AgentProcess:
    """One agent, on this machine or inside a private host. A context manager; may be started again after its end.

    Args:
        name: the host's name, as its certificate says.
        folder: made for its configuration, state, sockets and log; a short path.
        identity: its certificate.
        uri: libvirt's.
        listen: address to listen on.
        control_port: TCP port for orders.
        bulk_port: TCP port for data.
        host: runs inside it; on this machine when None.
        scratch_dir: the agent's ``scratch_dir``; a folder of its own when None.
        program: what to run instead of the installed agent.
        environment: variables added to this process's own.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        identity: Identity,
        *,
        uri: str = "qemu:///system",
        listen: str = "127.0.0.1",
        control_port: int = CONTROL_PORT,
        bulk_port: int = BULK_PORT,
        host: PrivateHost | None = None,
        scratch_dir: Path | None = None,
        program: Sequence[str] = (str(PROGRAM),),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.listen = listen
        self.control_port = control_port
        self.bulk_port = bulk_port
        self.config = folder / "agent.toml"
        self.log = folder / "agent.log"
        self._notify_path = folder / "notify"
        self._host = host
        self._argv = [*program, "--config", str(self.config)]
        self._environment = {**os.environ, **(environment or {}), "NOTIFY_SOCKET": str(self._notify_path)}
        self._process: subprocess.Popen[Any] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        scratch = scratch_dir or folder / "scratch"
        scratch.mkdir(exist_ok=True)
        settings = {
            "name": name,
            "listen": listen,
            "control_port": control_port,
            "bulk_port": bulk_port,
            "state_dir": str(folder / "state"),
            "runtime_dir": str(folder / "run"),
        }
        tls = {"ca": identity.ca, "certificate": identity.certificate, "key": identity.key}
        libvirt = {"uri": uri, "scratch_dir": str(scratch)}
        self.config.write_text(f"{_toml(settings)}\n[tls]\n{_toml(tls)}\n[libvirt]\n{_toml(libvirt)}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.stop()

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The agent's own PID, as seen from outside the host it runs in."""
        assert self._process is not None
        return getattr(self._process, "inner_pid", self._process.pid)

    def start(self) -> None:
        """Start it; returns when it has told its supervisor ``READY=1`` (sd_notify(3))."""
        assert not self.running, f"agent {self.name} runs already"
        self._notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(self._notify_path))
            self._process = self._spawn(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment)
            try:
                self._wait_ready(notify)
            except BaseException:
                self.kill9()
                raise
        self._notify_path.unlink()

    def stop(self) -> int:
        """SIGTERM, then wait; returns the exit code. Raises `AgentError` when it does not end (it is killed then)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise AgentError(f"agent {self.name} ignored SIGTERM for {END_TIMEOUT_S} s:\n{self._tail()}") from None

    def kill9(self) -> None:
        """SIGKILL, then wait. What it started goes on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(END_TIMEOUT_S)

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT, also for the ``nsenter`` above it, which stops itself when its child is stopped."""
        assert self._process is not None
        for pid in {self.pid, self._process.pid}:
            os.kill(pid, signal.SIGCONT)

    def _spawn(self, **options: Any) -> subprocess.Popen[Any]:
        if self._host is not None:
            return self._host.spawn(self._argv, **options)
        return subprocess.Popen(self._argv, **options)

    def _wait_ready(self, notify: socket.socket) -> None:
        assert self._process is not None
        notify.settimeout(0.1)  # only to notice an agent that has ended instead of becoming ready
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                pass
            if (code := self._process.poll()) is not None:
                raise AgentError(f"agent {self.name} ended with exit code {code} before it was ready:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise AgentError(f"agent {self.name} was not ready after {READY_TIMEOUT_S} s:\n{self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _toml(values: Mapping[str, object]) -> str:
    """Lines of strings and integers; a JSON string is a TOML basic string."""
    return "".join(
        f"{key} = {value if isinstance(value, int) else json.dumps(str(value))}\n" for key, value in values.items()
    )
