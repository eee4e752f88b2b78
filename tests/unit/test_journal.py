"""The journal, the requests and the registry's guards, on a real database file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import journal, registry
from coordinator.database import Database
from coordinator.entries import EntryKind, JournalEntry, Phase, RunRecord
from coordinator.errors import UsageError, WrongState
from coordinator.model import Newest, OperatorCall, OriginalFlag, RunLimits, RunOptions, ShutdownPolicy, State
from coordinator.pairlock import is_locked, pair_lock
from coordinator.plain import from_json, to_json
from coordinator.progress import ProgressMeter
from coordinator.records import PassRecord, SurveyRecord, ViewRecord
from coordinator.registry import Superseded
from coordinator.reports import downtime_s
from coordinator.runlog import RunLog
from protocol.messages import DiskProgress, PassReport, Power
from tests.unit.test_states import pair_in

RUN = RunRecord(
    id="r1",
    pair="web",
    options=RunOptions(power_on=False, shutdown_policy=ShutdownPolicy.FORCE, shutdown_timeout_s=1.5),
    actor="root@dr",
    started_s=10.0,
    ended_s=None,
    outcome=None,
    reason="",
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(tmp_path / "registry.sqlite")
    with opened.transaction() as connection:
        registry.add_pair(connection, pair_in(State.FAILOVER))
        journal.create_run(connection, RUN)
    yield opened
    opened.close()


def entry(
    step: str, kind: EntryKind, at_s: float = 0.0, phase: Phase = Phase.DO, result: object = None
) -> JournalEntry:
    return JournalEntry(
        seq=0,
        pair="web",
        run="r1",
        epoch=1,
        at_s=at_s,
        kind=kind,
        phase=phase,
        step=step,
        actor="root@dr",
        sentence="",
        elapsed_s=None,
        result=None if result is None else to_json(result),
    )


def test_entries_come_back_in_order_and_whole(database: Database) -> None:
    record = ViewRecord(view="r1-1", live=True)
    with database.transaction() as connection:
        written = [
            journal.append(connection, entry("open_view:1", EntryKind.INTENT)),
            journal.append(connection, entry("open_view:1", EntryKind.DONE, result=record)),
        ]
    with database.reading() as connection:
        read = journal.entries(connection, "web", "r1")
    assert list(read) == written
    assert read[0].seq < read[1].seq
    log = RunLog(read)
    assert log.result("open_view:1", ViewRecord) == record
    assert log.is_done("open_view:1")
    assert log.attempts("open_view:1") == 1


def test_options_survive_the_journal(database: Database) -> None:
    with database.reading() as connection:
        assert journal.get_run(connection, "r1") == RUN


def test_a_request_is_claimed_once_and_answered_once(database: Database) -> None:
    with database.transaction() as connection:
        asked = journal.ask(connection, pair="web", run="r1", verb="cancel", actor="me", at_s=1.0)
    with database.transaction() as connection:
        claimed = journal.claim(connection, "web", "r1", "cancel")
        assert claimed is not None
        assert (claimed.id, claimed.verb, claimed.claimed) == (asked, "cancel", True)
        assert journal.claim(connection, "web", "r1", "cancel") is None
        journal.answer(connection, asked, "done")
        journal.answer(connection, asked, "done twice")
        assert journal.get_request(connection, asked).answer == "done"


def test_a_request_to_another_run_is_not_claimed(database: Database) -> None:
    with database.transaction() as connection:
        journal.ask(connection, pair="web", run="r0", verb="cancel", actor="me", at_s=1.0)
        assert journal.claim(connection, "web", "r1", "cancel") is None


def test_only_the_latest_progress_is_kept(database: Database) -> None:
    meter = ProgressMeter(run="r1", step="pass:1", started_s=0.0)
    with database.transaction() as connection:
        for second in (1, 2):
            disk = DiskProgress(
                target="vda", total_bytes=100, done_bytes=20 * second, zero_bytes=5, changed_bytes=8, wire_bytes=4
            )
            picture = meter.take((disk,), monotonic_s=float(second), wall_s=1000.0 + second)
            journal.save_progress(connection, "web", picture)
        assert journal.load_progress(connection, "web") == picture
        assert (picture.rate_bytes_s, picture.eta_s, picture.saved_bytes) == (20.0, 3.0, 36)
        journal.clear_progress(connection, "web")
        assert journal.load_progress(connection, "web") is None


def test_a_stale_epoch_writes_nothing(database: Database) -> None:
    with database.transaction() as connection:
        epoch = registry.raise_epoch(connection, "web")
    with pytest.raises(Superseded, match="taken over"), database.transaction() as connection:
        registry.set_flag(connection, "web", epoch - 1, OriginalFlag(condition="torn"))
    with pytest.raises(Superseded), database.transaction() as connection:
        registry.move(connection, "web", epoch - 1, State.SYNCING)
    with database.reading() as connection:
        assert registry.get_pair(connection, "web") == replace(pair_in(State.FAILOVER), epoch=epoch)


def test_only_listed_moves_are_written(database: Database) -> None:
    with pytest.raises(WrongState), database.transaction() as connection:
        registry.move(connection, "web", 1, State.FAILBACK)


def test_an_operator_call_lives_as_long_as_its_state(database: Database) -> None:
    call = OperatorCall(sentence="look", exits=("resume", "cancel"), before=State.SYNCING)
    with database.transaction() as connection:
        registry.move(connection, "web", 1, State.SYNCING)
        assert registry.move(connection, "web", 1, State.NEEDS_OPERATOR, operator=call).operator == call
        assert registry.move(connection, "web", 1, State.SYNCING).operator is None


def test_a_vm_belongs_to_one_pair(database: Database) -> None:
    other = replace(pair_in(State.READY), name="mail", newest=Newest.ORIGINAL)
    with pytest.raises(UsageError, match="belongs to the pair web"), database.transaction() as connection:
        registry.add_pair(connection, other)


def test_records_with_reports_survive_json() -> None:
    report = PassReport(view="r1-1", elapsed_s=1.0, disks=())
    record = PassRecord(view="r1-1", source=report, target=report)
    assert from_json(to_json(record), PassRecord) == record


def surveyed(power: Power) -> SurveyRecord:
    return SurveyRecord(
        original_power=Power.OFF,
        replica_power=power,
        original_fingerprint="a",
        replica_fingerprint="b",
        bulk_port=1,
        disks=(),
    )


def test_downtime_runs_from_the_order_to_power_off_until_somebody_serves() -> None:
    begun = [
        entry("survey", EntryKind.DONE, 1.0, result=surveyed(Power.RUNNING)),
        entry("replica_off", EntryKind.INTENT, 10.0),
        entry("replica_off", EntryKind.DONE, 12.0),
    ]
    assert downtime_s(RunLog(begun)) is None
    assert downtime_s(RunLog(begun), now_s=15.0) == 5.0
    assert downtime_s(RunLog([*begun, entry("original_on", EntryKind.DONE, 30.0)])) == 20.0
    assert downtime_s(RunLog([*begun, entry("replica_off", EntryKind.DONE, 25.0, Phase.UNDO)])) == 15.0
    assert downtime_s(RunLog([*begun, entry("original_on", EntryKind.DONE, 3.0)])) == 0.0, "the clock was set back"


def test_a_replica_that_was_off_anyway_has_no_downtime() -> None:
    log = RunLog(
        [
            entry("survey", EntryKind.DONE, 1.0, result=surveyed(Power.OFF)),
            entry("replica_off", EntryKind.INTENT, 10.0),
        ]
    )
    assert downtime_s(log, now_s=50.0) is None


def test_one_process_holds_a_pair(tmp_path: Path) -> None:
    assert not is_locked(tmp_path, "web")
    with pair_lock(tmp_path, "web"):
        assert is_locked(tmp_path, "web")
        assert not is_locked(tmp_path, "mail")
    assert not is_locked(tmp_path, "web")


def test_options_of_a_run_from_before_there_were_limits_are_read() -> None:
    assert from_json('{"power_on":false}', RunOptions) == RunOptions(power_on=False, limits=RunLimits())


def test_the_last_time_a_step_took_is_that_of_the_pair_or_else_of_any_other(database: Database) -> None:
    with database.transaction() as connection:
        known = pair_in(State.FAILOVER)
        original, replica = (replace(vm, name="mail", uuid=f"mail-{vm.host}") for vm in (known.original, known.replica))
        registry.add_pair(connection, replace(known, name="other", original=original, replica=replica))
        for pair, step, elapsed_s in (
            ("web", "verify", 1.0),
            ("other", "verify", 9.0),
            ("web", "verify", 2.0),
            ("other", "protect_replica", 3.0),
        ):
            done = replace(entry(step, EntryKind.DONE), pair=pair, elapsed_s=elapsed_s)
            journal.append(connection, done)
        journal.append(connection, replace(entry("verify", EntryKind.FAILED), elapsed_s=7.0))
    with database.reading() as connection:
        assert journal.last_seconds(connection, "web", ("verify", "protect_replica", "original_on")) == {
            "verify": 2.0,
            "protect_replica": 3.0,
        }
