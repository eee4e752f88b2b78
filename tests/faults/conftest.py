"""A rig for the part of the matrix that every test run does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Rig, open_rig
from tests.lab.leftovers import Leftovers


@pytest.fixture(scope="module")
def rig(lab_cache: Path) -> Iterator[Rig]:
    """Two private hosts, their agents, verbs that can be stopped, and a pair in *Failover*."""
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    with open_rig(folder, lab_cache) as opened:
        yield opened
    shutil.rmtree(folder)
