"""A plan of several pairs on two real hosts: one VM that fails, the others come home, and all of it is taken back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.lab import console
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

PLAN = """
parallel = 2
parallel-per-host = 2

[defaults]
shutdown-timeout = "60s"

[[group]]
name = "databases"
pairs = ["{0}"]

[[group]]
name = "deaf"
after = []
pairs = ["{1}"]

[[group]]
name = "applications"
after = ["databases"]
delay = "2s"
pairs = ["{2}"]

[pair.{1}]
shutdown-timeout = "3s"
"""


def _plan(site: Site, *pairs: LabPair, text: str = PLAN) -> str:
    file: Path = site.folder / f"{pairs[0].name}.toml"
    file.write_text(text.format(*(pair.name for pair in pairs)))
    return str(file)


def _states(site: Site, file: str) -> dict[str, Any]:
    return {row["pair"]: row["state"] for row in site.failback("status", "--plan", file)["pairs"]}


def _came_home_s(site: Site, pair: LabPair) -> float:
    entries = site.failback("history", pair.name)["entries"]
    return float([e["at_s"] for e in entries if e["kind"] == "state" and e["step"] == "Failback"][-1])


def _went_off_s(site: Site, pair: LabPair) -> float:
    entries = site.failback("history", pair.name)["entries"]
    return float([e["at_s"] for e in entries if e["kind"] == "state" and e["step"] == "Switching"][-1])


def test_one_vm_that_fails_keeps_no_other_from_coming_home_and_the_whole_is_taken_back(site: Site) -> None:
    db, app = site.make_pair("db", formats=("qcow2",)), site.make_pair("app", formats=("raw",))
    deaf = site.make_pair("deaf", formats=("qcow2",), ignore_acpi=True)
    file = _plan(site, db, deaf, app)
    assert site.failback("plan", "--plan", file)["refusals"] == []

    answer = site.failback("start", "--plan", file, "--yes", "--foreground", exit_code=1)
    places = {row["pair"]: row["place"] for row in answer["pairs"]}
    assert places == {"db": "home", "deaf": "failed", "app": "home"}
    assert "power off" in next(row["sentence"] for row in answer["pairs"] if row["pair"] == "deaf")
    for pair in (db, app):
        console.wait_ready(pair.original.log)
        assert console.found(pair.original.log) == console.last(pair.replica.log)
        assert not pair.replica.is_running()
    assert _went_off_s(site, app) >= _came_home_s(site, db) + 2.0
    assert deaf.replica.is_running()
    assert not deaf.original.is_running()
    console.wait_for_writes(deaf.replica.log, "vda", 1)

    answer = site.failback("undo", "--plan", file, "--yes")
    assert set(_states(site, file).values()) == {"Failover"}, answer
    for pair in (db, deaf, app):
        assert pair.replica.is_running()
        assert not pair.original.is_running()


@pytest.mark.long
def test_pairs_behind_a_failed_one_are_held_back_until_it_is_mended_and_then_committed(site: Site) -> None:
    first = site.make_pair("first", formats=("qcow2",), ignore_acpi=True)
    second = site.make_pair("second", formats=("qcow2",))
    text = (
        '[defaults]\nshutdown-timeout = "3s"\n[[group]]\nname = "a"\npairs = ["{0}"]\n'
        '[[group]]\nname = "b"\npairs = ["{1}"]\n'
    )
    file = _plan(site, first, second, text=text)
    answer = site.failback("start", "--plan", file, "--yes", "--foreground", exit_code=1)
    places = {row["pair"]: (row["place"], row["turn"]) for row in answer["pairs"]}
    assert places == {"first": ("failed", "come"), "second": ("stopped", "held")}
    assert second.replica.is_running()
    assert _states(site, file) == {"first": "Failover", "second": "Ready to switch"}

    Path(file).write_text(Path(file).read_text() + '[pair.first]\nshutdown-policy = "force"\n')
    site.failback("start", "--plan", file, "--yes", "--foreground")
    assert _states(site, file) == {"first": "Failback", "second": "Failback"}
    assert _went_off_s(site, second) >= _came_home_s(site, first)
    site.failback("commit", "--plan", file, "--restore-point", "drop", "--yes")
    assert _states(site, file) == {"first": "Ready", "second": "Ready"}
    assert all(pair.original.is_running() for pair in (first, second))


@pytest.mark.long
def test_a_killed_plan_goes_on_where_its_journals_say(site: Site) -> None:
    one, two = site.make_pair("one", formats=("qcow2",)), site.make_pair("two", formats=("qcow2",))
    text = '[[group]]\nname = "a"\npairs = ["{0}"]\n[[group]]\nname = "b"\npairs = ["{1}"]\n'
    file = _plan(site, one, two, text=text)
    with site.bulk_stalled():
        run = site.spawn("start", "--plan", file, "--yes", "--foreground")
        site.wait_for_status("one", lambda status: status["step"] == "pass:1", run)
        run.send_signal(signal.SIGKILL)
        run.wait(60)
    assert not any(row["active"] for row in site.failback("status", "--plan", file)["pairs"])
    answer = site.failback("resume", "--plan", file, "--foreground")
    assert {row["place"] for row in answer["pairs"]} == {"home"}, json.dumps(answer)
    assert _went_off_s(site, two) >= _came_home_s(site, one)
    site.failback("undo", "--plan", file, "--yes")
    assert set(_states(site, file).values()) == {"Failover"}
