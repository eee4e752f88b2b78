"""Sites for the end-to-end tests: made once for a module, since two hosts take seconds to come up."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.leftovers import Leftovers
from tests.lab.site import Site, open_site


@pytest.fixture(scope="module", params=[None], ids=["root"])
def site(request: pytest.FixtureRequest, guest: Guest, lab_cache: Path) -> Iterator[Site]:
    """Two private hosts, their agents, a coordinator; QEMU runs as the user in the parameter."""
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    with open_site(folder, guest, lab_cache, qemu_user=request.param) as opened:
        yield opened
    shutil.rmtree(folder)
