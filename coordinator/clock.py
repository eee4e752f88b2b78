"""Time and randomness behind seams, so that a whole run can be simulated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Protocol

Tokens = Callable[[int], str]
"""Gives that many random bytes, as lower-case hex."""


class Clock(Protocol):
    """Wall time for people (the journal), monotonic time for durations. No wall time decides anything."""

    def wall_s(self) -> float:
        """Seconds since 1970, UTC."""

    def monotonic_s(self) -> float:
        """Seconds that only ever grow, within one process."""


class SystemClock:
    """The machine's clocks."""

    def wall_s(self) -> float:
        """Seconds since 1970, UTC."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds that only ever grow, within one process."""
        return time.monotonic()


system_tokens: Tokens = secrets.token_hex
