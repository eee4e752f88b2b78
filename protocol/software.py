"""What this software calls itself in handshakes: for people to read, never for decisions."""

from __future__ import annotations

from importlib.metadata import version

SOFTWARE = f"failback {version('failback')}"
