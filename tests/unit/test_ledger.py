"""The agent's ledger: durable, strict about what it reads, one process at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from agent import durable
from agent.ledger import (
    ConditionRecord,
    DiskCondition,
    FencedImage,
    FenceRecord,
    Ledger,
    LedgerError,
    LockKind,
    ProtectedImage,
    ProtectionRecord,
    TrackedImage,
    TrackingRecord,
)

FENCE = FenceRecord(
    vm_uuid="u1",
    pair="web",
    run="r1",
    side="original",
    autostart_before=True,
    images=(FencedImage(target="vda", path=Path("/x/a.raw"), format="raw", kind=LockKind.EXCLUSIVE),),
)
PROTECTION = ProtectionRecord(
    vm_uuid="u2",
    pair="web",
    snapshot="failback-web-r1",
    images=(ProtectedImage(target="vda", base=Path("/b"), base_format="raw", overlay=Path("/o")),),
)


def test_everything_written_is_there_after_reopening(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    ledger.raise_epoch("web", 3)
    ledger.put_fence(FENCE)
    ledger.put_condition(ConditionRecord(vm_uuid="u1", condition=DiskCondition.EQUALS_VIEW, view="v2"))
    ledger.put_protection(PROTECTION)
    ledger.close()
    again = Ledger.open(tmp_path)
    assert again.epoch("web") == 3
    assert again.fence("u1") == FENCE
    condition = again.condition("u1")
    assert condition is not None
    assert (condition.condition, condition.view) == (DiskCondition.EQUALS_VIEW, "v2")
    assert again.protection("u2", "failback-web-r1") == PROTECTION
    again.close()


def test_an_epoch_never_falls(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    ledger.raise_epoch("web", 5)
    ledger.raise_epoch("web", 4)
    assert ledger.epoch("web") == 5
    assert ledger.epoch("other") == 0
    ledger.close()


def test_records_are_replaced_and_dropped_by_vm(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    ledger.put_fence(FENCE)
    ledger.drop_fence("u1")
    ledger.drop_fence("u1")
    ledger.put_condition(ConditionRecord(vm_uuid="u1", condition=DiskCondition.TORN))
    ledger.put_condition(ConditionRecord(vm_uuid="u1", condition=DiskCondition.INTACT))
    ledger.put_protection(PROTECTION)
    ledger.drop_protection("u2", "failback-web-r1")
    assert ledger.fence("u1") is None
    assert ledger.contents.conditions == (ConditionRecord(vm_uuid="u1", condition=DiskCondition.INTACT),)
    assert ledger.protection("u2", "failback-web-r1") is None
    ledger.close()


def test_a_second_agent_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match="another failback-agent already uses"):
        Ledger.open(tmp_path)
    ledger.close()
    Ledger.open(tmp_path).close()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 1, "fences": 7}', '{"version": 1, "unheard": []}', '{"version": 1, "epochs": [{}]}'],
)
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path)
    assert (tmp_path / "ledger.json").read_text() == text


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"version": 2}')
    with pytest.raises(LedgerError, match="version 2"):
        Ledger.open(tmp_path)


def test_a_state_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger.open(tmp_path / "file" / "state")


def test_what_views_record_is_kept_by_view_and_forgotten_by_vm(tmp_path: Path) -> None:
    with contextlib.closing(Ledger.open(tmp_path)) as ledger:
        image = TrackedImage(target="vda", path=Path("/a"), identity="1")
        for view in ("r1-1", "r1-2"):
            ledger.put_tracking(TrackingRecord(vm_uuid="a", view=view, images=(image,)))
        ledger.put_tracking(TrackingRecord(vm_uuid="b", view="r1-1", images=()))
        ledger.put_thaw("a")
        ledger.put_thaw("a")
        ledger.drop_trackings("a", ["r1-2"])
    with contextlib.closing(Ledger.open(tmp_path)) as ledger:
        assert ledger.tracked_image("a", "r1-1", "vda") is None
        assert ledger.tracked_image("a", "r1-2", "vda") == image
        assert ledger.tracked_image("a", "r1-2", "vdb") is None
        assert ledger.tracking("b", "r1-1") is not None
        assert [owed.vm_uuid for owed in ledger.contents.thaws] == ["a"]
        ledger.drop_thaw("a")
        assert ledger.contents.thaws == ()


def test_what_a_killed_agent_renamed_is_made_durable_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger.open(tmp_path).close()
    (tmp_path / "progress").mkdir()
    done: list[str] = []
    read = Ledger._read

    def reading(ledger: Ledger) -> object:
        done.append("read")
        return read(ledger)

    monkeypatch.setattr(durable, "_sync", lambda folder: done.append(folder.name))
    monkeypatch.setattr(Ledger, "_read", reading)
    Ledger.open(tmp_path).close()
    assert done == [tmp_path.name, "progress", "read"]
