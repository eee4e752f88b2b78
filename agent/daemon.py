"""`failback-agent`: the daemon on every hypervisor host.

It listens for orders (control) and for data (bulk), talks to the local libvirt, and ends on SIGTERM with every view
closed. What a person can get wrong ends in one sentence on standard error, never in a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import sys
from functools import partial
from pathlib import Path

import click
import structlog
import trio

from agent.config import DEFAULT_PATH, Config, load
from agent.errors import AgentError, ConfigError
from agent.ledger import Ledger
from agent.service import SOFTWARE, AgentService, failure_of
from agent.virt.libvirt_host import LibvirtHost
from protocol.bulk import accept_bulk
from protocol.channel import serve_control
from protocol.errors import ProtocolError
from protocol.messages import Failure
from protocol.tls import certificate_fingerprint, client_context, server_context

log = structlog.get_logger("failback.agent")

EXIT_FAILED = 1
EXIT_USAGE = 2
MAX_ARRIVING = 64
"""Bulk connections that may be in their handshake at once; more wait in the kernel's queue."""


class StartError(AgentError):
    """The agent cannot start."""

    code = "start"


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)): one datagram to the socket it named; nothing when it named none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # Whoever asked to be told may be gone by now; that is no reason to fail.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
    ):
        sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        sender.sendall(state.encode())


async def serve(config: Config) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        AgentError, ProtocolError: it cannot start; nothing is left running.
    """
    tls = config.tls
    server = server_context(certificate=tls.certificate, key=tls.key, ca=tls.ca)
    client = client_context(certificate=tls.certificate, key=tls.key, ca=tls.ca)
    ledger = await trio.to_thread.run_sync(lambda: Ledger.open(config.state_dir))
    try:
        _make_runtime_dir(config)
        control = await _listen(config.listen, config.control_port, "control_port")
        bulk = await _listen(config.listen, config.bulk_port, "bulk_port")
        hypervisor = await trio.to_thread.run_sync(
            lambda: LibvirtHost(config.libvirt.uri, scratch_dir=config.libvirt.scratch_dir)
        )
        service = AgentService(
            config=config,
            fingerprint=certificate_fingerprint(tls.certificate),
            client_context=client,
            hypervisor=hypervisor,
            ledger=ledger,
        )
        try:
            await _serve(service, control, bulk, server)
        finally:
            with trio.CancelScope(shield=True):
                await service.stop()
                await trio.to_thread.run_sync(hypervisor.close)
    finally:
        ledger.close()


async def _serve(
    service: AgentService,
    control: list[trio.SocketListener],
    bulk: list[trio.SocketListener],
    context: ssl.SSLContext,
) -> None:
    for error in await service.threads.on_libvirt(service.fences.restore):
        log.error("a fence could not be taken back", reason=error.sentence)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            for listener in bulk:
                nursery.start_soon(_accept_bulk, service, listener, context)
            answer = partial(serve_control, host=service.config.name, map_error=_mapped)
            await nursery.start(answer, control, context, service.handle)
            log.info("ready", host=service.config.name, software=SOFTWARE, libvirt=service.config.libvirt.uri)
            notify("READY=1")
            async for number in signals:
                log.info("stopping", signal=signal.Signals(number).name)
                notify("STOPPING=1")
                nursery.cancel_scope.cancel()
                break


def _mapped(error: Exception) -> Failure | None:
    failure = failure_of(error)
    if failure is None:
        log.error("a request failed in a way nobody foresaw", exc_info=error)
    else:
        log.warning("request failed", code=failure.code, reason=failure.sentence)
    return failure


async def _accept_bulk(service: AgentService, listener: trio.SocketListener, context: ssl.SSLContext) -> None:
    """Take bulk connections; each handshake in a thread of its own, so that a slow peer delays nobody."""
    arriving = trio.CapacityLimiter(MAX_ARRIVING)

    async def one(raw: socket.socket) -> None:
        try:
            connection, hello = await trio.to_thread.run_sync(lambda: accept_bulk(raw, context), limiter=arriving)
        except ProtocolError as error:
            log.warning("bulk connection refused", code=error.code, reason=error.sentence)
            return
        await service.passes.arrive(connection, hello)

    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED):
                    raise
                log.error("a bulk connection could not be accepted", reason=os.strerror(error.errno))
                await trio.sleep(0.1)  # descriptors are freed by others; without a pause this loop would only spin
                continue
            nursery.start_soon(one, socket.socket(fileno=stream.socket.detach()))


async def _listen(address: str, port: int, key: str) -> list[trio.SocketListener]:
    try:
        return list(await trio.open_tcp_listeners(port, host=address))
    except OSError as error:
        cause = error.strerror or str(error)
        raise StartError(
            f'the agent cannot listen on {address} port {port}: {cause.lower()}; free the port or change "{key}"'
        ) from error


def _make_runtime_dir(config: Config) -> None:
    try:
        config.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Sockets of an agent that was killed; the processes behind them died with it.
        for stale in config.runtime_dir.glob("nbd-*"):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise StartError(
            f"the runtime folder {config.runtime_dir} cannot be made: {error.strerror}; set runtime_dir to another"
        ) from error


def _set_up_logging() -> None:
    """Lines a person can read on a terminal, one JSON object a line elsewhere (systemd's journal, a file)."""
    renderer = (
        structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default=DEFAULT_PATH,
    show_default=True,
    help="The TOML configuration file.",
)
@click.option("--check-config", is_flag=True, help="Read and check the configuration, say so, and exit.")
@click.version_option(message=f"failback-agent: {SOFTWARE}")
def main(path: Path, check_config: bool) -> None:
    """Serve this hypervisor host's virtual machines to failback.

    The agent runs on every host, beside its libvirt; the `failback` command asks, the agents act. It is usually started
    by systemd (failback-agent.service) and ends cleanly on SIGTERM.

    \b
    A configuration, /etc/failback/agent.toml:
      name = "prod1"
      [tls]
      ca = "/etc/failback/pki/ca.pem"
      certificate = "/etc/failback/pki/prod1.pem"
      key = "/etc/failback/pki/prod1.key"
    """
    _set_up_logging()
    try:
        config = load(path)
        if check_config:
            click.echo(f"{path} is fine: host {config.name}, libvirt {config.libvirt.uri}")
            return
        trio.run(serve, config, strict_exception_groups=True)
    except ConfigError as error:
        click.echo(f"failback-agent: {error.sentence}", err=True)
        sys.exit(EXIT_USAGE)
    except (AgentError, ProtocolError) as error:
        click.echo(f"failback-agent: {error.sentence}", err=True)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
