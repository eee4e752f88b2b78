"""The connection to libvirt: opened late, reopened once when libvirtd was restarted, its errors mapped to ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import libvirt

from agent.errors import HypervisorError, HypervisorUnreachable, NoSuchDomain
from agent.virt.events import LifecycleWatch, ensure_event_loop

_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 5

_LOST_CODES = frozenset({libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_NO_CONNECT})
_CURES = {
    libvirt.VIR_ERR_OPERATION_TIMEOUT: "Another operation holds the VM: wait for it or end it (virsh domjobinfo).",
    libvirt.VIR_ERR_AUTH_FAILED: "Run the agent as root, or in the group libvirt.",
    libvirt.VIR_ERR_AUTH_UNAVAILABLE: "Run the agent as root, or in the group libvirt.",
    libvirt.VIR_ERR_ACCESS_DENIED: "Give the agent's user the right in libvirt's access control.",
}
_MESSAGE_CURES = (
    ("while checkpoint exists", "Delete its checkpoints first (virsh checkpoint-delete --metadata)."),
    ("No space left", "Make room there and try again."),
    ("Failed to terminate process", "QEMU is stuck, likely in its storage: repair that, or end the VM by force."),
    ("Permission denied", "Let libvirt's QEMU user reach the path, and check AppArmor or SELinux."),
    ("Failed to get", "Another process holds the image: end it, or lift the fence."),
)

_embedded_lock = threading.Lock()
_embedded: dict[str, Any] = {}
_embedded_watch = LifecycleWatch()


def mapped(error: libvirt.libvirtError, operation: str, vm: str) -> HypervisorError:
    """Libvirt's error as ours: VM, operation, libvirt's own message, and the cure where it is known."""
    message = (error.get_error_message() or str(error)).strip().rstrip(".")
    code = error.get_error_code()
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return no_such_domain(vm)
    if is_connection_lost(error):
        return HypervisorUnreachable(
            f"VM {vm}: the connection to libvirt was lost during {operation}, its outcome is unknown ({message}): "
            "check that libvirtd (or virtqemud) runs, then try again.",
            vm=vm,
            operation=operation,
        )
    cure = _CURES.get(code) or next((cure for words, cure in _MESSAGE_CURES if words in message), "")
    return HypervisorError(
        f"VM {vm}: {operation} failed, libvirt says: {message}. {cure}".rstrip(),
        vm=vm,
        operation=operation,
        libvirt_code=code,
    )


def no_such_domain(vm: str) -> NoSuchDomain:
    """The error for a VM that this libvirt does not know."""
    return NoSuchDomain(f"This host's libvirt knows no VM {vm}: compare with `virsh list --all`.", vm=vm)


def is_connection_lost(error: libvirt.libvirtError) -> bool:
    """Whether the error speaks of the connection and not of the call."""
    return error.get_error_code() in _LOST_CODES or error.get_error_domain() in (
        libvirt.VIR_FROM_RPC,
        libvirt.VIR_FROM_REMOTE,
    )


@contextmanager
def errors_of(operation: str, vm: str) -> Iterator[None]:
    """Everything libvirt raises inside becomes an `agent.errors.HypervisorError`."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise mapped(error, operation, vm) from error


class Connection:
    """A libvirt connection that outlives restarts of libvirtd; thread-safe.

    Only look-ups are repeated on a new connection: an operation that was cut short has an unknown outcome, and its
    caller must look before it acts again.

    Attributes:
        uri: where to.
        watch: counts the lifecycle events of this host's domains, as long as it is connected.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._is_embedded = urlsplit(uri).path == "/embed"
        self.watch = _embedded_watch if self._is_embedded else LifecycleWatch()
        self._lock = threading.Lock()
        self._handle: Any = None
        self._subscription: int | None = None

    def domain(self, name_or_uuid: str) -> Any:
        """The ``virDomain`` of that UUID or name; raises `agent.errors.NoSuchDomain`."""

        def look_up(handle: Any) -> Any:
            try:
                return handle.lookupByUUIDString(name_or_uuid)
            except libvirt.libvirtError as error:
                # Not a UUID at all, or the UUID of nobody: a name may still look like one.
                if error.get_error_code() not in (libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_NO_DOMAIN):
                    raise
            return handle.lookupByName(name_or_uuid)

        return self.ask(look_up, "look-up", name_or_uuid)

    def ask(self, question: Callable[[Any], Any], operation: str, vm: str) -> Any:
        """Put a question that changes nothing; once more on a new connection when the old one proves dead."""
        handle = self._alive()
        try:
            return question(handle)
        except libvirt.libvirtError as error:
            if not is_connection_lost(error):
                raise mapped(error, operation, vm) from error
        self._drop(handle)
        with errors_of(operation, vm):
            return question(self._alive())

    def alive(self) -> Any:
        """A handle for an act, which is not repeated: libvirt is asked whether the connection stands first.

        Raises:
            HypervisorUnreachable: there is none.
        """
        self.ask(lambda handle: handle.getLibVersion(), "asking for its version", "-")
        return self._alive()

    def _alive(self) -> Any:
        with self._lock:
            if self._handle is not None and not self._handle_is_alive():
                self._close()
            if self._handle is None:
                self._handle = self._open()
            return self._handle

    def _handle_is_alive(self) -> bool:
        try:
            return bool(self._handle.isAlive())
        except libvirt.libvirtError:
            return False

    def _open(self) -> Any:
        ensure_event_loop()
        try:
            if self._is_embedded:
                return _open_embedded(self.uri)
            handle = libvirt.open(self.uri)
            handle.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
            self._subscription = self.watch.attach(handle)
        except libvirt.libvirtError as error:
            raise HypervisorUnreachable(
                f"Cannot connect to libvirt at {self.uri}: {(error.get_error_message() or str(error)).rstrip('.')}. "
                + self._cure(),
                uri=self.uri,
            ) from error
        return handle

    def _cure(self) -> str:
        if self._is_embedded:
            return "Check that its root is an absolute path with an etc/qemu.conf in it; a process can have only one."
        return "Check that libvirtd (or virtqemud) runs and that the agent may use it (root, or the group libvirt)."

    def _drop(self, handle: Any) -> None:
        with self._lock:
            if self._handle is handle:
                self._close()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if self._is_embedded:
            return
        # A subscription holds the connection open. One that is dead already cannot be closed any better.
        with suppress(libvirt.libvirtError):
            handle.domainEventDeregisterAny(self._subscription)
        with suppress(libvirt.libvirtError):
            handle.close()

    def close(self) -> None:
        """Disconnect; the next call would connect again."""
        with self._lock:
            if self._handle is not None:
                self._close()


def _open_embedded(uri: str) -> Any:
    """The process's one connection to an embedded driver.

    Every opening loads the driver once more, which libvirt 9.0 allows some twenty times per process ("Too many
    drivers"); so it is opened once, shared, and closed by the end of the process. Domains go on after that.
    """
    with _embedded_lock:
        if uri not in _embedded:
            handle = libvirt.open(uri)
            _embedded_watch.attach(handle)
            _embedded[uri] = handle
        return _embedded[uri]
