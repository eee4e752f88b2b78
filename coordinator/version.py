"""What this software calls itself, for the journal."""

from __future__ import annotations

from importlib.metadata import version

SOFTWARE = f"failback {version('failback')}"
