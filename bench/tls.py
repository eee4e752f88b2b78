"""``tls-vs-blocking``: what one bulk connection carries, beside plain blocking `ssl` sockets, same certificates.

As a command it is one end of either: ``python -m bench.tls sink|send ours|plain FOLDER PORT BYTES``.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.benchmark import GIB, Settings
from bench.measure import Result, Run, column, is_noisy, ratio_of_medians, with_ratios
from bench.ports import free_ports
from bench.stream import running
from protocol.bulk import accept_bulk, connect_bulk
from protocol.messages import BlockData, Codec, Credit
from protocol.tls import certificate_fingerprint, client_context, server_context
from tests.lab.pki import LabPki

KINDS = ("ours", "plain")
MESSAGE_BYTES = 1 << 20
WINDOW_BYTES = 32 << 20
PROOF_BYTES = 32  # nobody checks it here: this is about the connection
ENDS = ("source", "target")


def tls_vs_blocking(settings: Settings) -> Result:
    """GB/s of a bulk connection ÷ GB/s of blocking `ssl` sockets; messages of 1 MiB, two processes, loopback."""
    pki = LabPki(settings.folder / "pki")
    for end in ENDS:
        pki.agent(end)
    size = settings.size_bytes(4)
    runs: list[Run] = []
    for number in settings.count():
        run: Run = {f"{kind}_gb_per_s": round(size / 1e9 / _once(kind, settings, size), 4) for kind in KINDS}
        if number:
            runs.append(run)
    return Result(
        ratio=ratio_of_medians(runs, "ours_gb_per_s", "plain_gb_per_s"),
        runs=with_ratios(runs, "ours_gb_per_s", "plain_gb_per_s"),
        noisy=is_noisy(column(runs, "plain_gb_per_s")),
        page_cache="does not matter: nothing is read from disk",
        facts={"gib_per_round": size / GIB, "message_bytes": MESSAGE_BYTES},
    )


def _once(kind: str, settings: Settings, size_bytes: int) -> float:
    words = [kind, str(settings.folder / "pki"), str(free_ports(1)[0]), str(size_bytes)]
    with running(["bench.tls", "sink", *words], ()):
        sender = [sys.executable, "-m", "bench.tls", "send", *words]
        done = subprocess.run(sender, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _files(folder: Path, end: str) -> dict[str, Path]:
    return {"certificate": folder / f"{end}.crt", "key": folder / f"{end}.key", "ca": folder / "ca.crt"}


def _sink(kind: str, folder: Path, port: int, size_bytes: int) -> None:
    context = server_context(**_files(folder, "target"))
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("ready", flush=True)
        plain, _ = listener.accept()
        if kind == "ours":
            _sink_ours(plain, context, size_bytes)
            return
        buffer = bytearray(MESSAGE_BYTES)
        with context.wrap_socket(plain, server_side=True) as tls:
            left = size_bytes
            while left > 0:
                left -= tls.recv_into(buffer)
            tls.sendall(b"!")


def _sink_ours(plain: socket.socket, context: ssl.SSLContext, size_bytes: int) -> None:
    bulk, _ = accept_bulk(plain, context)
    bulk.welcome(window_bytes=WINDOW_BYTES, ahead_bytes=WINDOW_BYTES)
    left = size_bytes
    while left > 0:
        message, payload = bulk.receive()
        assert isinstance(message, BlockData)
        left -= message.plain_bytes
        bulk.send(Credit(payload_bytes=payload.nbytes))
    bulk.refuse("done", "that was all")


def _send(kind: str, folder: Path, port: int, size_bytes: int) -> float:
    context = client_context(**_files(folder, "source"))
    chunk = os.urandom(MESSAGE_BYTES)
    if kind == "ours":
        return _send_ours(context, folder, port, size_bytes, chunk)
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="target") as tls:
        started = time.monotonic()
        for _ in range(size_bytes // MESSAGE_BYTES):
            tls.sendall(chunk)
        tls.recv(1)
        return time.monotonic() - started


def _send_ours(context: ssl.SSLContext, folder: Path, port: int, size_bytes: int, chunk: bytes) -> float:
    """The connection is used as a pass uses it: one thread sends, one takes the credits in."""
    bulk, _ = connect_bulk(
        "127.0.0.1",
        port,
        server_name="target",
        context=context,
        peer_fingerprint=certificate_fingerprint(folder / "target.crt"),
        grant="bench",
        target="vda",
        digest_seed=1,
    )
    listening = threading.Thread(target=bulk.receive)
    listening.start()
    started = time.monotonic()
    for number in range(size_bytes // MESSAGE_BYTES):
        head = struct.pack("<QQ", number * MESSAGE_BYTES, MESSAGE_BYTES) + bytes(PROOF_BYTES)
        bulk.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MESSAGE_BYTES), head, chunk)
    listening.join()  # until the sink's Goodbye, which comes when it has everything
    seconds = time.monotonic() - started
    bulk.close()
    return seconds


if __name__ == "__main__":
    end, kind, folder, port, size = sys.argv[1:]
    if end == "sink":
        _sink(kind, Path(folder), int(port), int(size))
    else:
        print(_send(kind, Path(folder), int(port), int(size)), flush=True)
