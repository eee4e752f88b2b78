"""The benchmarks' report, profile and counters: what is made of what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.benchmark import Settings
from bench.catalog import BENCHMARKS
from bench.generated import BLOCK_BYTES, GeneratedDisk
from bench.plots import share_of_target
from bench.profiling import top_of
from bench.report import markdown
from bench.resident import private_bytes

FOUND: dict[str, object] = {
    "name": "compare-vs-rsync",
    "ratio": 0.25,
    "unit": "ratio",
    "target": 0.2,
    "better": "lower",
    "met": False,
    "rounds": 1,
    "page_cache": "warm",
    "noisy": True,
    "runs": [{"ours_s": 1.23456, "ratio": 0.25}],
    "machine": {"cores": 2},
    "took_s": 12.0,
}
NAMES_OF_THE_ISSUE = {
    "compare-vs-rsync": 0.20,
    "compare-live": 0.35,
    "identical-vs-limit": 1.5,
    "cold-vs-read": 1.15,
    "wire-vs-zstd": 1.10,
    "full-vs-nbdcopy": 0.8,
    "tls-vs-blocking": 0.8,
    "link-use": 0.97,
    "wan-use": 0.90,
    "two-disks": 1.1,
    "memory": 256,
}


def test_every_measure_has_its_name_and_its_target() -> None:
    targets = {name: found.target.value for name, found in BENCHMARKS.items() if found.target is not None}
    assert NAMES_OF_THE_ISSUE.items() <= targets.items()
    assert {name for name, found in BENCHMARKS.items() if found.target and found.target.better == "higher"} == {
        "tls-vs-blocking",
        "link-use",
        "wan-use",
    }


def test_sizes_are_whole_units_and_never_nothing() -> None:
    assert Settings(Path(), size_gib=0.5).size_bytes(8) == 512 << 20
    assert Settings(Path(), size_gib=0.001).size_bytes(8) == 16 << 20
    assert Settings(Path()).size_bytes(2) == 2 << 30


def test_page_says_what_was_measured_missed_noisy_and_failed() -> None:
    failed: dict[str, object] = {"name": "memory", "error": "ended with exit code 1", "took_s": 3.0}
    page = markdown([FOUND, failed], what="abc", when="today", about={"cores": 2}, plots=["targets.png"])
    assert "| `compare-vs-rsync` | 0.25 | ≤ 0.2 | **no** | yes | 1 | 12.0 s |" in page
    assert "| `memory` | failed, see below |" in page
    assert "ended with exit code 1" in page
    assert "| 1.235 | 0.25 |" in page
    assert "![targets](targets.png)" in page


def test_measure_is_turned_so_that_up_to_one_is_good() -> None:
    assert share_of_target(FOUND) == pytest.approx(1.25)
    assert share_of_target({**FOUND, "better": "higher", "ratio": 0.4, "target": 0.8}) == pytest.approx(2)
    assert share_of_target({**FOUND, "target": None}) is None
    assert share_of_target({"name": "memory", "error": "ended"}) is None


def test_private_memory_is_clean_and_dirty_together() -> None:
    rollup = "00400000-7ffe r--p 00000000 00:00 0 [rollup]\nRss: 900 kB\nShared_Clean: 500 kB\n"
    assert private_bytes(rollup + "Private_Clean:   100 kB\nPrivate_Dirty:   300 kB\n") == 400 << 10


def test_profile_gives_a_call_to_the_line_of_ours_that_made_it() -> None:
    tops = top_of(
        [
            "run (trio/_core/_run.py:1);read (agent/disk/raw.py:10);preadv (os.py:1) 3",
            "run (trio/_core/_run.py:1);_work (trio/x.py:2);WorkerThread._work (trio/_core/_thread_cache.py:211) 96",
            "run (threading.py:1);_worker (concurrent/futures/thread.py:81) 50",
            "receive (protocol/bulk.py:1);TlsSocket._wait (protocol/tls_socket.py:250) 20",
            "run (trio/_core/_run.py:1) 1",
        ]
    )
    assert tops["self"] == ["75.0% preadv (os.py:1)", "25.0% run (trio/_core/_run.py:1)"]
    assert tops["ours"] == ["75.0% read (agent/disk/raw.py:10)", "25.0% (outside)"]


def read(disk: GeneratedDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_generated_disk_reads_the_same_however_it_is_asked() -> None:
    disk = GeneratedDisk("vda", 64 << 20, differs=True)
    whole = read(disk, 0, 64 << 20)
    assert read(disk, 12345, 777_777) == whole[12345 : 12345 + 777_777]
    assert len({whole[at : at + 4096] for at in range(0, len(whole), BLOCK_BYTES)}) == 1024


def test_generated_target_differs_in_few_blocks_until_they_are_written() -> None:
    source, target = (GeneratedDisk("vda", 256 << 20, differs=differs) for differs in (False, True))
    blocks = range(0, 256 << 20, BLOCK_BYTES)
    differ = [at for at in blocks if read(source, at, 4096) != read(target, at, 4096)]
    assert 1 <= len(differ) <= 16
    for at in differ:
        target.write(at, memoryview(read(source, at, 4096)))
    assert read(source, 0, 256 << 20) == read(target, 0, 256 << 20)
