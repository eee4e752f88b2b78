"""A monitor of one's own into a lab guest's QEMU: writes to a running VM's disks, as its guest would, and counts them.

A write goes through the disk's own block backend, so that frozen views, dirty bitmaps and overlays see it; when and
where it happens is the test's choice, which no guest could offer.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 60.0


class Monitor:
    """A QMP connection (https://www.qemu.org/docs/master/interop/qmp-spec.html); a context manager.

    Args:
        path: the socket of `tests.lab.domain.domain_xml`'s ``monitor``.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self._lines.readline()  # the greeting
            self.ask("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> Any:
        """The answer of a command; what happens meanwhile is passed over."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise AssertionError(f"QEMU refused {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"QEMU ended while it was asked {command}")

    def write(self, disk: int, offset_bytes: int, length_bytes: int, *, pattern: int = 0x5A) -> None:
        """Write a run of one byte to the guest's virtio disk of that number (0: the first), and wait for it.

        What went well QEMU prints into its own log; only what did not comes back.
        """
        self._io(disk, f"write -P {pattern} {offset_bytes} {length_bytes}")

    def write_file(self, disk: int, offset_bytes: int, length_bytes: int, content: Path) -> None:
        """As `write`, with the first bytes of a file."""
        self._io(disk, f"write -s {content} {offset_bytes} {length_bytes}")

    def flush(self, disk: int) -> None:
        """Flush the disk: what was written is in its image file, an image's own tables included."""
        self._io(disk, "flush")

    def _io(self, disk: int, command: str) -> None:
        device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
        line = f'qemu-io -d {device} "{command}"'
        told = str(self.ask("human-monitor-command", **{"command-line": line}))
        assert not told.strip(), told

    def written_bytes(self) -> int:
        """What the guest has written to all of its disks since QEMU started."""
        return sum(int(device["stats"]["wr_bytes"]) for device in self.ask("query-blockstats"))

    def is_running(self) -> bool:
        """Whether the guest executes: False while it is paused, for an I/O error say."""
        return bool(self.ask("query-status")["running"])
