"""One cell of the matrix: a fault at a boundary, then what the tool says to do, until the pair rests; a verdict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass, field

from tests.faults.boundaries import Boundary, Way
from tests.faults.faults import Fault
from tests.faults.rig import Rig
from tests.faults.verbs import Verb

START: tuple[str, ...] = ("start", "--yes", "--foreground", "--power-on", "--discard-divergence")
START += ("--shutdown-timeout", "10s", "--late-evidence", "proceed")
PROTECTED: tuple[str, ...] = (*START, "--protect-original")
"""The same, with the original under a working snapshot: what is committed or undone is such a run."""
RESTING = frozenset({"Failover", "Failback", "Ready"})
MOST_ATTEMPTS = 6
VERB_S = 90.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A fault at a boundary."""

    fault: Fault
    boundary: Boundary

    @property
    def name(self) -> str:
        """For people and the command line."""
        return f"{self.fault.name} {self.boundary.words}"

    @property
    def begins_in(self) -> str:
        """The state that the pair must be in."""
        failback = self.boundary.way in (Way.COMMIT, Way.UNDO) and self.boundary.step != "end_audit"
        return "Failback" if failback else "Failover"


@dataclass
class Outcome:
    """What became of a cell. `error`: why it is red; empty: it is green."""

    cell: Cell
    happened: list[str] = field(default_factory=list)
    saw: str = ""
    seconds: float = 0.0
    error: str = ""


def run_cell(rig: Rig, cell: Cell) -> Outcome:
    """Let it happen. The pair rests in a named state afterwards, or the outcome says why not."""
    outcome = Outcome(cell)
    try:
        _strike_and_recover(rig, cell, outcome)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        rig.watch.excused = False
    return outcome


def _strike_and_recover(rig: Rig, cell: Cell, outcome: Outcome) -> None:
    assert rig.state() == cell.begins_in, f"the pair is in {rig.state()}"
    if cell.begins_in == "Failover":
        rig.serve()
        rig.write()
    verb = come_to(rig, cell.boundary)
    said = cell.fault.strike(rig, verb)
    if said:
        outcome.happened.append(said)
    struck_s = time.monotonic()
    if not cell.fault.ends_verb:
        verb.go_on()
    cell.fault.mend(rig)
    verb.wait(VERB_S)
    outcome.happened.append("killed" if cell.fault.ends_verb else f"`{verb.words[0]}` ended with {verb.code}")
    outcome.saw = verb.sentence()
    _recover(rig, outcome)
    outcome.seconds = time.monotonic() - struck_s
    state = rig.state()
    outcome.happened.append(state)
    _by_hand(rig, state)
    rig.judge(state)


def come_to(rig: Rig, boundary: Boundary) -> Verb:
    """A verb that stands still at the boundary."""
    pair = rig.pair.name
    stops = (boundary.stop,)
    start = PROTECTED if boundary.step in ("protect_original", "merge_original") else START
    match boundary.way:
        case Way.RUN:
            verb = rig.verbs.start(*start, "--verify", "full", pair, stops=stops)
        case Way.COMMIT:
            words = ["commit", "--yes", "--restore-point", "drop"]
            if boundary.step == "end_audit":
                first = rig.verbs.start(*start, pair, stops=[("audit", "do", "intent")])
                _stands(first)
                first.kill()
                words.append("--no-wait-audit")
            verb = rig.verbs.start(*words, pair, stops=stops)
        case Way.UNDO:
            verb = rig.verbs.start("undo", "--yes", pair, stops=stops)
        case Way.CANCEL:
            first = rig.verbs.start(*start, "--switch", "manual", pair)
            rig.wait_until(lambda: rig.state() == "Ready to switch" or first.code is not None, "never ready to switch")
            os.kill(first.pid, 2)
            first.wait(VERB_S)
            verb = rig.verbs.start("cancel", pair, stops=stops)
        case Way.ROLL_BACK:
            verb = rig.verbs.start(*start, pair, stops=[("verify", "do", "intent"), *stops])
            _stands(verb)
            tops = rig.pair.original.sources()
            for disk in rig.pair.original.disks:
                os.utime(tops[disk.target])  # somebody was at the disks: the switchover must not go on
            verb.go_on()
    _stands(verb)
    return verb


def _stands(verb: Verb) -> None:
    code = verb.wait(VERB_S)
    assert verb.stopped, f"`failback {verb.words[0]}` ended with {code} before the boundary: {verb.sentence()}"


def _recover(rig: Rig, outcome: Outcome) -> None:
    """What the tool says, until the pair rests."""
    pair, latest = rig.pair.name, outcome.saw
    for attempt in range(MOST_ATTEMPTS):
        state = rig.state()
        if state in RESTING:
            return
        way = "resume"
        if not outcome.saw:
            outcome.saw = latest = str(rig.verbs.must("status", pair)["means"])
        if state == "Needs operator":
            call = json.loads(rig.exits())
            latest = call["sentence"]
            if attempt >= MOST_ATTEMPTS // 2:
                way = next((exit_ for exit_ in ("undo", "cancel") if exit_ in call["exits"]), "resume")
        elif state in ("Syncing", "Ready to switch") and attempt >= MOST_ATTEMPTS // 2:
            way = "cancel"
        words = {"resume": ["resume", "--foreground"], "undo": ["undo", "--yes"], "cancel": ["cancel"]}[way]
        _obey(rig, latest, outcome)
        verb = rig.verbs.run(*words, pair)
        outcome.happened.append(f"`{way}` ended with {verb.code}")
        latest = verb.sentence()
        if verb.code and rig.state() not in RESTING:
            outcome.happened.append(f"“{latest}”")
    raise AssertionError(f"the pair still is in {rig.state()}")


def _obey(rig: Rig, sentence: str, outcome: Outcome) -> None:
    """What a sentence asks of a person, and a person would do."""
    original, replica = rig.pair.original, rig.pair.replica
    if rig.runs(original) and rig.watch.excused and re.search(r"power (it|the original) off", sentence):
        original.host.virsh("destroy", original.name)
        rig.watch.excused = False
        outcome.happened.append("the original powered off by hand")
    if "start it and" in sentence and not rig.runs(replica):
        replica.start()
        outcome.happened.append("the replica started by hand")


def _by_hand(rig: Rig, state: str) -> None:
    """What a person does at the end: the newest side's VM runs, one started by hand beside it does not."""
    newest = rig.pair.replica if state == "Failover" else rig.pair.original
    other = rig.pair.original if newest is rig.pair.replica else rig.pair.replica
    if rig.watch.excused and rig.runs(other):
        other.host.virsh("destroy", other.name)
    if not rig.runs(newest):
        newest.start()
