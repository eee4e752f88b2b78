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
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import click
import structlog
import trio

from agent import commands
from agent.config import DEFAULT_PATH, Config, load
from agent.errors import AgentError, ConfigError, HypervisorError
from agent.idle_views import IdleViews
from agent.ledger import Ledger
from agent.local import listen_locally, serve_locally
from agent.service import SOFTWARE, AgentService, failure_of
from agent.sync.buffers import received_memory
from agent.sync.conversation import Unforeseen
from agent.virt.libvirt_host import LibvirtHost
from protocol.bulk import accept_bulk
from protocol.channel import serve_control
from protocol.errors import ProtocolError
from protocol.link import tune_listener
from protocol.messages import Failure
from protocol.tls import certificate_fingerprint, client_context, server_context

log = structlog.get_logger("failback.agent")

EXIT_FAILED = 1
EXIT_USAGE = 2
MAX_ARRIVING = 64
"""Bulk connections that may be in their handshake at once; more wait in the kernel's queue."""
MEND_EVERY_S = 5.0
STOP_WITHIN_S = 100.0
"""Less than the unit's ``TimeoutStopSec``, more than any of our own waits."""
SOCKET_NAME_BYTES = 24
"""Longest name of a socket in the runtime folder, ``/nbd-PID-NUMBER``; a path may have 107 bytes (unix(7))."""


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
    # Around everything: a signal that came while none was listened for would end the process in the middle of its end.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        failure: AgentError | ProtocolError | None = None
        async with trio.open_nursery() as nursery:
            working = trio.CancelScope()
            nursery.start_soon(_stop_on_signal, signals, working, nursery)
            with working:
                try:
                    await _run(config)
                except (AgentError, ProtocolError) as error:
                    failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _stop_on_signal(signals: AsyncIterator[int], working: trio.CancelScope, nursery: trio.Nursery) -> None:
    """The first signal ends the agent in order; repeated, it changes nothing: what is left to do is done at once
    already, and leaving it half done would leave guests with open views."""
    async for number in signals:
        name = signal.Signals(number).name
        if working.cancel_called:
            log.info("stopping already", signal=name)
            continue
        log.info("stopping", signal=name)
        notify("STOPPING=1")
        working.cancel()
        nursery.start_soon(_give_up)


async def _give_up() -> None:
    """Storage or a libvirtd that hangs keeps a thread for ever. The end is then the one that any crash may bring, and
    that everything durable is made for."""
    await trio.sleep(STOP_WITHIN_S)
    log.error("storage or libvirt does not answer; ending without waiting for it", after_s=STOP_WITHIN_S)
    os._exit(EXIT_FAILED)


async def _run(config: Config) -> None:
    tls = config.tls
    server = server_context(certificate=tls.certificate, key=tls.key, ca=tls.ca)
    client = client_context(certificate=tls.certificate, key=tls.key, ca=tls.ca)
    ledger = await trio.to_thread.run_sync(lambda: Ledger.open(config.state_dir))
    try:
        _make_runtime_dir(config)
        control = await _listen(config.listen, config.control_port, "control_port")
        bulk = await _listen(config.listen, config.bulk_port, "bulk_port")
        for listener in bulk:
            tune_listener(listener.socket)
        hypervisor = LibvirtHost(config.libvirt.uri, scratch_dir=config.libvirt.scratch_dir)
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
    local = await _listen_locally(service.config)
    # The locks of every fence first, and with libvirt or without: this host may be starting its VMs at this moment.
    told = await _mend(service, service.fences.restore, frozenset())
    async with trio.open_nursery() as nursery:
        for listener in bulk:
            nursery.start_soon(_accept_bulk, service, listener, context)
        nursery.start_soon(serve_locally, service, local)
        nursery.start_soon(_look_at_libvirt, service)
        nursery.start_soon(_keep_promises, service, told)
        answer = partial(serve_control, host=service.config.name, map_error=_mapped)
        await nursery.start(answer, control, context, service.handle)
        log.info("ready", host=service.config.name, software=SOFTWARE, libvirt=service.config.libvirt.uri)
        notify("READY=1")


async def _look_at_libvirt(service: AgentService) -> None:
    """An agent without libvirt holds its fences and answers; that it can do no more is said once, here."""
    try:
        await service.threads.on_libvirt(service.hypervisor.facts)
    except HypervisorError as error:
        log.warning("libvirt cannot be reached; requests fail until it can", reason=error.sentence)


async def _keep_promises(service: AgentService, told: frozenset[str]) -> None:
    """Storage or libvirt may come up after the agent, an image may be replaced under its lock: what a fence is missing
    is taken, and what a killed agent left open is closed, as soon as it can be."""

    idle = IdleViews(service.views, service.passes.is_granted)

    def keep() -> tuple[AgentError, ...]:
        views = service.views
        return (*service.fences.mend(), *views.close_orphans(), *idle.close(), *views.thaw_owed())

    while True:
        told = await _mend(service, keep, told)
        await trio.sleep(MEND_EVERY_S)


async def _mend(
    service: AgentService, mend: Callable[[], tuple[AgentError, ...]], told: frozenset[str]
) -> frozenset[str]:
    """Say what cannot be brought about, once for as long as it is so."""
    missing = frozenset(error.sentence for error in await service.threads.on_libvirt(mend))
    for sentence in sorted(missing - told):
        log.error("a fence or a view is not as it should be", reason=sentence)
    if told and not missing:
        log.info("fences and views are as they should be")
    return missing


def _mapped(error: Exception) -> Failure | None:
    failure = failure_of(error)
    if failure is None:
        log.error("a request failed in a way nobody foresaw", exc_info=error)
    elif isinstance(error, Unforeseen):
        log.error("a pass failed in a way nobody foresaw", exc_info=error)
    else:
        log.warning("request failed", code=failure.code, reason=failure.sentence)
    return failure


async def _accept_bulk(service: AgentService, listener: trio.SocketListener, context: ssl.SSLContext) -> None:
    """Take bulk connections; each handshake in a thread of its own, so that a slow peer delays nobody."""
    arriving = trio.CapacityLimiter(MAX_ARRIVING)
    room = trio.Semaphore(MAX_ARRIVING)

    async def one(raw: socket.socket) -> None:
        try:
            connection, hello = await service.threads.connecting(
                lambda: accept_bulk(raw, context, allocate=received_memory.allocate),
                lambda made: made[0].close(),
                arriving,
            )
            await service.passes.arrive(connection, hello)
        except ProtocolError as error:
            log.warning("bulk connection refused", code=error.code, reason=error.sentence)
        except Exception:  # whatever a stranger makes us stumble over must not end the agent
            log.exception("a bulk connection failed in a way nobody foresaw")
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        while True:
            await room.acquire()
            try:
                stream = await listener.accept()
            except OSError as error:
                room.release()
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


async def _listen_locally(config: Config) -> trio.SocketListener:
    try:
        return await listen_locally(config)
    except OSError as error:
        raise StartError(
            f"the agent cannot listen on its local socket in {config.runtime_dir}: {error.strerror}; "
            "make the folder writable or set runtime_dir to another"
        ) from error


def _make_runtime_dir(config: Config) -> None:
    if len(os.fsencode(config.runtime_dir.absolute())) + SOCKET_NAME_BYTES > 107:
        raise StartError(
            f"the runtime folder {config.runtime_dir} has too long a path for sockets in it; set runtime_dir to a "
            f"path of {107 - SOCKET_NAME_BYTES} bytes at most"
        )
    try:
        config.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Sockets of an agent that was killed; the processes behind them died with it.
        for stale in config.runtime_dir.glob("nbd-*"):
            stale.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=config.runtime_dir):
            pass  # made by somebody else, it may be ours to see and not to use
    except OSError as error:
        raise StartError(
            f"the runtime folder {config.runtime_dir} cannot be used: {error.strerror}; "
            "make it writable or set runtime_dir to another"
        ) from error


def _set_up_logging() -> None:
    """Lines a person can read on a terminal, one JSON object a line elsewhere (systemd's journal, a file); what
    `protocol` logs through the standard library looks the same."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(colors=True)
    else:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
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
@click.pass_context
def main(ctx: click.Context, path: Path, check_config: bool) -> None:
    """Serve this hypervisor host's virtual machines to failback.

    The agent runs on every host, beside its libvirt; the `failback` command asks, the agents act. It is usually started
    by systemd (failback-agent.service) and ends cleanly on SIGTERM. Without a command it serves.

    \b
    A configuration, /etc/failback/agent.toml:
      name = "prod1"
      [tls]
      ca = "/etc/failback/pki/ca.crt"
      certificate = "/etc/failback/pki/prod1.crt"
      key = "/etc/failback/pki/prod1.key"
    """
    _set_up_logging()
    ctx.obj = path
    if ctx.invoked_subcommand is not None:
        return
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


main.add_command(commands.fence)
main.add_command(commands.check)


if __name__ == "__main__":
    main()
