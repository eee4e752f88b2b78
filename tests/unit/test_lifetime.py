"""Since when a domain runs: from its process and from the log that libvirt keeps of its starts and stops."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.virt.lifetime import last_times, lifetime

START = "2026-03-01 10:00:00.000+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.9\n"
STOP = "2026-03-01 11:00:00.500+0000: shutting down, reason=shutdown\n"
AGAIN = "2026-03-01 12:00:00.000+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.9\n"
REFUSED = "2026-03-01 12:00:01.000+0000: shutting down, reason=failed\n"
AT_10, AT_11, AT_12 = 1772359200.0, 1772362800.5, 1772366400.0


@pytest.mark.parametrize(
    ("log", "times"),
    [
        ("", (0.0, 0.0)),
        ("char device redirected to /dev/pts/1\n", (0.0, 0.0)),
        (START, (AT_10, 0.0)),
        (START + "LC_ALL=C \\\n/usr/bin/qemu-system-x86_64 \\\n" + STOP, (AT_10, AT_11)),
        (START + STOP + AGAIN, (AT_12, AT_11)),
        (START + STOP + AGAIN + REFUSED, (AT_10, AT_11)),
        (AGAIN + REFUSED, (0.0, 0.0)),
    ],
)
def test_the_log_tells_the_last_start_and_stop_and_a_start_that_was_refused_is_none(
    log: str, times: tuple[float, float]
) -> None:
    assert last_times(log.encode()) == times


def test_the_log_of_a_domain_is_found_by_its_name_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "web1.log").write_text(START + STOP, encoding="utf-8")
    known = lifetime("web1", tmp_path, tmp_path)
    assert (known.running_since_s, known.started_s, known.stopped_s) == (0.0, AT_10, AT_11)
    assert lifetime("web2", tmp_path, tmp_path).started_s == 0.0


def test_a_process_tells_since_when_it_runs_if_it_says_that_it_is_the_domain(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()", "guest=web1,debug-threads=on"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        (tmp_path / "web1.pid").write_text(f"{process.pid}", encoding="ascii")
        (tmp_path / "web.pid").write_text(f"{process.pid}", encoding="ascii")
        since_s = lifetime("web1", tmp_path, tmp_path).running_since_s
        assert abs(since_s - time.time()) < 30
        assert lifetime("web", tmp_path, tmp_path).running_since_s == 0.0
        process.stdin.close()
    assert not Path(f"/proc/{process.pid}").exists()
    assert lifetime("web1", tmp_path, tmp_path).running_since_s == 0.0
