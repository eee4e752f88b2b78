"""What the contract tests of hypervisors share: an administrator's connection, and the rigs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.hypervisor_rigs import FakeRig, LibvirtRig, Rig
from tests.lab.embed import embed_root
from tests.lab.leftovers import Leftovers


@pytest.fixture(scope="session")
def administrator() -> Iterator[Any]:
    """A connection to the one embedded root that a process can have, as a person at the host would use it."""
    import libvirt

    from agent.virt.events import ensure_event_loop

    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)  # swtpm runs as a user of its own
    ensure_event_loop()
    connection = libvirt.open(embed_root(folder))
    yield connection
    connection.close()
    shutil.rmtree(folder)


@pytest.fixture(params=["memory", pytest.param("libvirt", marks=pytest.mark.real)])
def rig(request: pytest.FixtureRequest, lab_folder: Path) -> Iterator[Rig]:
    if request.param == "memory":
        yield FakeRig(lab_folder)
        return
    real = LibvirtRig(request.getfixturevalue("administrator"), request.getfixturevalue("guest"), lab_folder)
    try:
        yield real
    finally:
        real.dispose()
