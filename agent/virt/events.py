"""Libvirt's event loop in a thread of its own, and lifecycle events as something to wait on.

The loop must be registered before the first connection is opened and must keep running: the embedded driver and
keep-alive of remote connections live on it (https://libvirt.org/html/libvirt-libvirt-event.html).
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import libvirt

_registration = threading.Lock()
_loop: threading.Thread | None = None


def ensure_event_loop() -> None:
    """Register libvirt's default event loop and run it in a daemon thread; once per process, harmless when repeated."""
    global _loop
    with _registration:
        if _loop is not None:
            return
        # Errors reach the caller as exceptions; libvirt's own handler would print each to stderr as well.
        libvirt.registerErrorHandler(_say_nothing, None)
        libvirt.virEventRegisterDefaultImpl()
        _loop = threading.Thread(target=_run_loop, name="libvirt-events", daemon=True)
        _loop.start()


def _say_nothing(_opaque: object, _error: object) -> None:
    return


def _run_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


class LifecycleWatch:
    """Counts lifecycle events by domain, so that a waiter notices the one that came while it was looking elsewhere."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: Counter[str] = Counter()

    def attach(self, connection: Any) -> int:
        """Follow every domain of a connection just opened; returns the number to end that by."""
        return int(connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None))

    def _on_event(self, _connection: Any, domain: Any, _event: int, _detail: int, _opaque: object) -> None:
        self.note(domain.UUIDString())

    def note(self, uuid: str) -> None:
        """An event of that domain has happened."""
        with self._changed:
            self._events[uuid] += 1
            self._changed.notify_all()

    def count(self, uuid: str) -> int:
        """Events of that domain so far."""
        with self._changed:
            return self._events[uuid]

    def wait_beyond(self, uuid: str, count: int, timeout_s: float) -> bool:
        """Wait until that domain has had more than `count` events; False at the deadline."""
        with self._changed:
            return self._changed.wait_for(lambda: self._events[uuid] > count, timeout_s)
