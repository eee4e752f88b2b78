"""What every test run shares: who may run real tests, the lab's cache and folders, and that nothing is left behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.lab import reaper
from tests.lab.guest import Guest, GuestError, build_guest
from tests.lab.leftovers import Leftovers

# Real tests run libvirt's QEMU driver; without a reaper above it, every guest's end may take half a minute. The
# run is forked once, here, before pytest has started any thread.
reaper.become_child_of_reaper()

# A shell that starts `make test` in the background, or nohup, has these ignored, and what answers to them is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "busybox": "busybox-static",
    "depmod": "kmod",
}
PROGRAMS_OF_ROOT = {"libvirtd": "libvirt-daemon-system", "ip": "iproute2", "tini": "tini", "nsenter": "util-linux"}
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
KEEP = bool(os.environ.get("FAILBACK_LAB_KEEP"))
LEFTOVERS = pytest.StashKey[Leftovers]()


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _why_not_real() -> str | None:
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=SEARCH_PATH) is None]
    missing += [f"python3-{name}" for name in ("libvirt",) if importlib.util.find_spec(name) is None]
    missing += ["python3-libnbd"] if importlib.util.find_spec("nbd") is None else []
    return f"needs the packages {', '.join(missing)} (`make setup` installs them)" if missing else None


def _why_not_root() -> str | None:
    if os.geteuid() != 0:
        return "needs root, for a private libvirtd, namespaces or loop devices (`sudo make test` runs it)"
    programs = PROGRAMS_OF_ROOT.items()
    missing = [package for program, package in programs if shutil.which(program, path=SEARCH_PATH) is None]
    return f"needs the packages {', '.join(missing)} (`make setup` installs them)" if missing else None


def pytest_configure(config: pytest.Config) -> None:
    """Remember what the machine looked like, to tell afterwards what a test left behind."""
    config.stash[LEFTOVERS] = Leftovers.watch()
    # So that fixtures are finalized when the reaper, or a person, ends the run.
    signal.signal(signal.SIGTERM, lambda _number, _frame: pytest.exit("ended by SIGTERM", returncode=143))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this user cannot run."""
    not_real, not_root = _why_not_real(), _why_not_root()
    for item in items:
        reasons = [
            reason
            for marker, reason in (("real", not_real), ("root", not_root))
            if reason and item.get_closest_marker(marker)
        ]
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing may be skipped."""
    report = yield
    if _in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself is not allowed in CI either."""
    report = yield
    if _in_ci() and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when it leaves a process, a mount, a namespace or a file behind."""
    left = session.config.stash[LEFTOVERS].found()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nThe tests left behind:\n  " + "\n  ".join(left))


@pytest.fixture(scope="session")
def lab_cache() -> Path:
    """Folder of what is built once and used by many runs: ``.lab`` in the repository, or $FAILBACK_LAB_DIR."""
    folder = Path(os.environ.get("FAILBACK_LAB_DIR") or REPOSITORY / ".lab")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def guest(lab_cache: Path) -> Guest:
    """The lab's guest; skips when it cannot be built here (no network, say)."""
    try:
        return build_guest(lab_cache)
    except GuestError as error:
        pytest.skip(str(error))


@pytest.fixture
def lab_folder() -> Iterator[Path]:
    """A folder with a short path that any user may traverse, removed after the test ($FAILBACK_LAB_KEEP keeps it).

    Unlike `tmp_path` it suits unix sockets (107 bytes) and a QEMU that does not run as root.
    """
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    if not KEEP:
        shutil.rmtree(folder)
