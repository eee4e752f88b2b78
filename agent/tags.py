"""The tag of a view: what its checkpoint, its bitmaps, its files and sockets are named after."""

from __future__ import annotations

import hashlib


def tag_of(view: str) -> str:
    """The tag that everything of a view carries: short, safe in a path whatever the view is called, and the same after
    a restart of the agent."""
    return f"failback-{hashlib.sha256(view.encode()).hexdigest()[:12]}"
