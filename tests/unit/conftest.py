"""What unit tests share: a folder whose writes cost nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.leftovers import Leftovers

MEMORY = Path("/dev/shm")
"""tmpfs on every Linux; a flush there is no trip to a disk, and the registry is opened exactly as in the product."""


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where that can be had, removed after the test: for tests that write a registry often."""
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir=MEMORY))
    yield folder
    shutil.rmtree(folder)
