"""What libvirt's hook says: no to a fenced VM, whatever its name or definition is by now; nothing to anybody else's."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent import fence_hook
from agent.fence_hook import judge
from agent.ledger import ConditionRecord, DiskCondition, FencedImage, FenceRecord, Ledger, LedgerError, LockKind

SITTING = "the list of fenced VMs cannot be read"


def _fence(image: Path, *, uuid: str = "u1", kind: LockKind = LockKind.EXCLUSIVE) -> FenceRecord:
    return FenceRecord(
        vm_uuid=uuid,
        vm_name="web",
        pair="shop",
        run="r1",
        side="original",
        autostart_before=True,
        images=(FencedImage(target="vda", path=image, format="raw", kind=kind),),
    )


def _xml(uuid: str, *disks: str) -> bytes:
    return f"<domain><uuid>{uuid}</uuid><devices>{''.join(disks)}</devices></domain>".encode()


def _disk(path: Path, below: str = "") -> str:
    return f"<disk type='file'><source file='{path}'/>{below}</disk>"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def state(tmp_path: Path, image: Path) -> Path:
    """The state folder of an agent that fences u1 with `image`, and has died."""
    ledger = Ledger.open(tmp_path / "state")
    ledger.put_fence(_fence(image))
    ledger.put_condition(ConditionRecord(vm_uuid="u1", condition=DiskCondition.TORN))
    ledger.close()
    return tmp_path / "state"


def test_the_sentence_names_pair_run_condition_and_both_ways_on(state: Path) -> None:
    said, warning = judge(str(state), "web", _xml("u1"))
    for words in (
        "VM web",
        "pair shop",
        "run r1",
        "original",
        "torn",
        "`failback status shop`",
        "fence lift web --reason",
    ):
        assert words in said, said
    assert warning == ""


def test_it_is_found_by_its_disks_whatever_it_is_called(state: Path, image: Path, tmp_path: Path) -> None:
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(image)
    hard.hardlink_to(image)
    for path in (image, link, hard):
        assert "fenced for the pair shop" in judge(str(state), "copy", _xml("u9", _disk(path)))[0]
    below = f"<backingStore type='file'><source file='{image}'/></backingStore>"
    assert "fenced" in judge(str(state), "copy", _xml("u9", _disk(tmp_path / "top", below)))[0]
    other = tmp_path / "b.raw"
    other.write_bytes(b"x")
    assert judge(str(state), "web", _xml("u9", _disk(other))) == ("", "")
    assert "fenced" in judge(str(state), "web", b"no xml")[0]


def test_a_frozen_base_may_be_read_by_others_and_not_written(tmp_path: Path, image: Path) -> None:
    ledger = Ledger.open(tmp_path / "state")
    ledger.put_fence(_fence(image, kind=LockKind.FROZEN))
    ledger.close()
    below = f"<backingStore type='file'><source file='{image}'/></backingStore>"
    state = str(tmp_path / "state")
    assert judge(state, "clone", _xml("u9", _disk(tmp_path / "top", below))) == ("", "")
    assert "fenced" in judge(state, "copy", _xml("u9", _disk(image)))[0]


DAMAGES = [
    None,
    "",
    "{",
    "[]",
    '{"fences": 7}',
    '{"fences": [{"vm_uuid": "u1"}]}',
    '{"fences": [{"vm_uuid": "u7", "images": 7}]}',
    "folder",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_a_damaged_list_a_fenced_vm_stays_off_and_others_are_told_of(
    state: Path, image: Path, damage: str | None
) -> None:
    file = state / "fenced.json"
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage is not None:
        file.write_text(damage)
    said, _ = judge(str(state), "web", _xml("u1"))
    assert "u1" in said or SITTING in said or "must not start" in said
    assert "fence lift" in said
    assert SITTING in judge(str(state), "copy", _xml("u9", _disk(image)))[0]
    refusal, warning = judge(str(state), "other", _xml("u9", _disk(image.with_name("other"))))
    assert refusal == ""
    assert SITTING in warning


def test_with_list_and_ledger_damaged_what_is_left_of_them_is_searched(state: Path) -> None:
    (state / "fenced.json").write_text('{"fences": [{"vm_uuid": "u1"')
    (state / "ledger.json").write_text("{")
    assert "is not started" in judge(str(state), "web", _xml("u1"))[0]
    (state / "fenced.json").unlink()
    refusal, warning = judge(str(state), "web", _xml("u1"))
    assert refusal == ""
    assert SITTING in warning


def test_a_vm_that_the_ledger_knows_and_does_not_fence_is_no_fenced_one(state: Path) -> None:
    ledger = Ledger.open(state)
    ledger.drop_fence("u1")
    ledger.close()
    (state / "fenced.json").unlink()
    assert judge(str(state), "web", _xml("u1"))[0] == ""


@pytest.mark.parametrize(("name", "code"), [("web", 1), ("other", 0)])
def test_a_hook_that_fails_itself_keeps_only_those_off_that_are_named_as_fenced(
    state: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    def fails(_state_dir: str, _name: str, _xml: bytes) -> tuple[str, str]:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(fence_hook, "judge", fails)
    monkeypatch.setattr(fence_hook, "STATE_DIR", str(state))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(_xml("u1"))))
    assert fence_hook.main(["hook", name, "prepare", "begin", "-"]) == code


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "reconnect", "attach"])
def test_every_other_operation_passes_whatever_is_wrong(state: Path, operation: str) -> None:
    assert _run(state, operation).returncode == 0


@pytest.mark.parametrize("operation", ["prepare", "restore", "migrate"])
def test_the_installed_text_refuses_whatever_begins_a_start(state: Path, operation: str) -> None:
    done = _run(state, operation)
    assert done.returncode == 1
    assert done.stdout == ""  # libvirt would take it for another definition
    assert done.stderr.count("\n") == 1
    assert "must not start" in done.stderr


def _run(state: Path, operation: str) -> subprocess.CompletedProcess[str]:
    text = Path(fence_hook.__file__).read_text().replace('STATE_DIR = ""', f"STATE_DIR = {str(state)!r}")
    return subprocess.run(
        [sys.executable, "-IS", "-c", text, "web", operation, "begin", "-"],
        input=_xml("u1").decode(),
        capture_output=True,
        text=True,
        check=False,
    )


# --- the list ---------------------------------------------------------------------------------------------------------


def _listed(state: Path) -> list[str]:
    return [fence["vm_uuid"] for fence in json.loads((state / "fenced.json").read_text())["fences"]]


def test_a_crash_between_list_and_ledger_leaves_an_entry_too_many_and_the_next_start_settles_it(
    state: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.open(state)

    def dies(_: Path, __: str) -> None:
        raise OSError(5, "dies here")

    with monkeypatch.context() as patched:
        patched.setattr("agent.ledger.replace_whole", dies)
        with pytest.raises(LedgerError):
            ledger.put_fence(_fence(image, uuid="u2"))
        assert _listed(state) == ["u1", "u2"]
        with pytest.raises(LedgerError):
            ledger.drop_fence("u1")
        assert "u1" in _listed(state)
    ledger.close()
    Ledger.open(state).close()
    assert _listed(state) == ["u1"]


def test_a_list_that_cannot_be_written_is_no_fence(state: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(state)

    def full(_: Path, __: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("agent.fence_list.replace_whole", full)
        with pytest.raises(LedgerError, match="No space"):
            ledger.put_fence(_fence(image, uuid="u2"))
    assert ledger.fence("u2") is None
    ledger.close()
