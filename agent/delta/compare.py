"""Comparing digests: which blocks must be sent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.delta.digests import Digests
from agent.errors import SyncError


def differing(ours: Digests, theirs: Digests) -> NDArray[np.bool_]:
    """For each block whether its digests differ, shape (n,).

    Raises:
        SyncError: the two sides hashed a different number of blocks.
    """
    if ours.shape != theirs.shape:
        raise SyncError(
            f"The two sides hashed {len(ours)} and {len(theirs)} blocks of the same ranges; "
            "update both agents to the same version and run the pass again."
        )
    return np.asarray(ours != theirs)
