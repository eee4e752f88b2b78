"""Every refusal: one case that meets it, and the words a person gets."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from coordinator.findings import NO_VM, VERSION, Case, Problem, SideFindings
from coordinator.model import DiskPair, RunOptions, State
from coordinator.plan import make_plan
from coordinator.refusals import RULES, find_refusals
from coordinator.refusals_disk import room_needed_bytes
from protocol.messages import (
    Condition,
    FenceDescription,
    Power,
    PowerAnswer,
    Side,
    SnapshotDescription,
    StateKind,
    StatePart,
)
from tests.unit.plan_cases import (
    GIB,
    ORIGINAL_UUID,
    PAIR,
    case,
    definition,
    disk,
    host,
    image,
    machine,
    part,
    side,
    vm,
)

ORIGINAL, REPLICA = Side.ORIGINAL, Side.REPLICA
UNREACHABLE = Problem(code="host-unreachable", sentence="the agent cannot be asked: Connection refused; start it")


def original(**changes: Any) -> Case:
    return case(original=side(ORIGINAL, **changes))


def replica(**changes: Any) -> Case:
    return case(replica=side(REPLICA, **changes))


def original_disk(**changes: Any) -> Case:
    return original(disks=(disk("vda", "/img/a.qcow2", **changes), disk("vdb", "/img/b.qcow2")))


def replica_disk(**changes: Any) -> Case:
    return replica(disks=(disk("vda", "/img/ra.qcow2", **changes), disk("vdb", "/img/rb.qcow2")))


def original_image(**changes: Any) -> Case:
    return original_disk(chain=(image("/img/a.qcow2", **changes),))


def written_after() -> Case:
    """The first disk of the original was written to a minute after the failover, by its host's clock."""
    spoiled = original_image(modified_s=1_700_000_060.0)
    findings = replace(spoiled.findings, failover_s=1_700_000_000.0)
    return replace(spoiled, findings=findings)


def both(
    original_parts: tuple[StatePart, ...] = (),
    replica_parts: tuple[StatePart, ...] = (),
    *,
    of: dict[str, Any] | None = None,
    original_of: dict[str, Any] | None = None,
    **told: Any,
) -> Case:
    """Both VMs with what their agents tell of them beside the disks; `of`: changes of both VMs, `told`: of what the
    original's agent tells."""
    same = of or {}
    return case(
        original=side(
            ORIGINAL, machine=machine(ORIGINAL, parts=original_parts, **told), **{**same, **(original_of or {})}
        ),
        replica=side(REPLICA, machine=machine(REPLICA, parts=replica_parts), **same),
    )


UEFI: dict[str, Any] = {"firmware": "uefi"}
NVRAM, TPM = part(StateKind.NVRAM), part(StateKind.TPM, format="2.0", size_bytes=6092)
NIC = "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br9'/></interface>"


def applying() -> Case:
    """A NIC of the replica is on a bridge that the production host lacks."""
    spoiled = case(
        original=side(ORIGINAL, machine=machine(ORIGINAL)),
        replica=side(REPLICA, machine=machine(REPLICA, definition=(definition(NIC),))),
        options=RunOptions(apply_config=True),
    )
    assert find_refusals(replace(spoiled, options=RunOptions())) == (), "only where it is to be applied"
    return spoiled


def creating(**original_disks: Any) -> Case:
    """The replica has a disk vdc that is to be created at the original."""
    disks = original_disks.pop("disks", vm(ORIGINAL).disks)
    created = DiskPair(original="vdc", replica="vdc")
    spoiled = case(
        pair=replace(PAIR, disks=(*PAIR.disks, created)),
        original=side(ORIGINAL, machine=machine(ORIGINAL, **original_disks), disks=disks),
        replica=side(
            REPLICA, machine=machine(REPLICA), disks=(*vm(REPLICA).disks, disk("vdc", "/c", chain=(image("/c"),)))
        ),
        options=RunOptions(create_missing=True),
    )
    return replace(spoiled, created=(created,))


CDROM = "<disk type='file' device='cdrom'><target dev='vdc' bus='sata'/></disk>"


def replica_image(**changes: Any) -> Case:
    return replica_disk(chain=(image("/img/ra.qcow2", **changes),))


def fence(pair: str, **changes: Any) -> FenceDescription:
    plain = FenceDescription(
        pair=pair,
        run="r1",
        side=ORIGINAL,
        autostart_before=True,
        locked=("vda", "vdb"),
        unlocked=(),
        condition=Condition.INTACT,
        view=None,
    )
    return replace(plain, **changes)


HELD = PowerAnswer(power=Power.OFF, images_free=False, holders=("vdb",))
HIDDEN = SideFindings(host=UNREACHABLE, vm=None)

MET: list[tuple[str, Case, str, str]] = [
    ("not-in-failover", case(pair=replace(PAIR, state=State.READY)), "web1", "failback failover web1"),
    ("not-in-failover", case(pair=replace(PAIR, state=State.FAILBACK)), "web1", "failback undo web1"),
    ("not-in-failover", case(pair=replace(PAIR, state=State.NEEDS_OPERATOR)), "web1", "failback status web1"),
    ("run-unfinished", case(pair=replace(PAIR, state=State.SYNCING, run="r7")), "web1", "failback resume web1"),
    ("run-unfinished", case(pair=replace(PAIR, state=State.UNDOING, run="r7")), "web1", "Run r7"),
    ("host-unreachable", case(original=HIDDEN), "prod1", "Connection refused"),
    ("host-unreachable", case(replica=HIDDEN), "dr1", "The agent cannot be asked"),
    (
        "agent-version",
        case(replica=SideFindings(host=Problem(code=VERSION, sentence="it speaks 7"), vm=None)),
        "dr1",
        "install the same failback release",
    ),
    (
        "tool-missing",
        original(host_answer=host("prod1", missing_tools=("qemu-nbd (qemu-utils)",))),
        "prod1",
        "qemu-utils",
    ),
    ("vm-gone", original(problem=Problem(code=NO_VM, sentence="no such VM")), "web1", ORIGINAL_UUID),
    (
        "vm-unreadable",
        original(problem=Problem(code="hypervisor", sentence="libvirt is down.")),
        "web1",
        "libvirt is down;",
    ),
    ("vm-redefined", original(uuid="0b7a3c52-57a5-4a5b-9f3c-3f1d1f3b0aff"), "web1", "0aff but was registered"),
    (
        "same-vm",
        case(pair=replace(PAIR, replica=PAIR.original), replica=side(ORIGINAL)),
        "web1",
        "are the same VM",
    ),
    ("both-running", original(power=Power.RUNNING), "web1", "--power-off-original"),
    ("original-not-off", original(power=Power.PAUSED), "web1", "virsh destroy --graceful web1"),
    ("replica-not-serving", replica(power=Power.PAUSED), "web1-replica", "virsh resume web1-replica"),
    ("replica-not-serving", replica(power=Power.SUSPENDED), "web1-replica", "dompmwakeup"),
    ("replica-not-serving", replica(power=Power.CRASHED), "web1-replica", "virsh destroy"),
    ("replica-not-serving", replica(power=Power.SHUTTING_DOWN), "web1-replica", "wait until it is off"),
    ("managed-save", original(managed_save=True), "web1", "managedsave-remove"),
    ("transient-vm", replica(persistent=False), "web1-replica", "virsh define"),
    ("restarts-on-poweroff", replica(on_poweroff="restart"), "web1-replica", "on_poweroff=restart"),
    ("restarts-on-poweroff", original(on_poweroff="preserve"), "web1", "on_poweroff=preserve"),
    ("foreign-job", replica(job="block copy of vda"), "web1-replica", "block copy of vda"),
    ("foreign-checkpoint", replica(checkpoints=("nightly",)), "web1-replica", "nightly"),
    (
        "user-snapshot",
        original(snapshots=(SnapshotDescription(name="before-upgrade", ours=False, external=False),)),
        "web1",
        "before-upgrade",
    ),
    ("passthrough", replica(passthrough=("pci 0000:01:00.0",)), "web1-replica pci 0000:01:00.0", "--exclude-disk 'pci"),
    (
        "machine-not-told",
        case(
            original=side(ORIGINAL, machine=Problem(code="forbidden", sentence="not taken"), firmware="uefi"),
            replica=side(REPLICA, machine=machine(REPLICA, parts=(NVRAM,)), firmware="uefi"),
        ),
        "web1",
        "is not known: not taken; install the same failback release",
    ),
    (
        "machine-not-told",
        replace(both(definition=(), problem="its definition is too long"), options=RunOptions(apply_config=True)),
        "web1",
        "its definition is too long",
    ),
    ("firmware-differs", both(original_of=UEFI), "web1", "boots with UEFI firmware"),
    (
        "firmware-differs",
        both((part(StateKind.NVRAM, size_bytes=131072),), (NVRAM,), of=UEFI),
        "web1",
        "another build of the firmware",
    ),
    ("firmware-differs", both((part(StateKind.NVRAM, format="qcow2"),), (NVRAM,), of=UEFI), "web1", "of qcow2"),
    ("tpm-differs", both(original_of={"has_tpm": True}), "web1-replica", "add one with `virsh edit web1-replica`"),
    (
        "tpm-differs",
        both((part(StateKind.TPM, format="1.2"),), (TPM,), of={"has_tpm": True}),
        "web1",
        "of version 1.2",
    ),
    (
        "state-not-carried",
        both((part(StateKind.TPM, problem="its TPM is the host's own"),), of={"has_tpm": True}),
        "web1",
        "TPM state of the original web1 on prod1 cannot be carried: its TPM is the host's own",
    ),
    (
        "machine-tool-missing",
        both((TPM,), (TPM,), of={"has_tpm": True}, missing_tools=("swtpm (swtpm)",)),
        "prod1",
        "lacks swtpm (swtpm)",
    ),
    ("network-missing", applying(), "web1", "bridge br9, which host prod1 does not have (it has: network default,"),
    ("cannot-create-disk", creating(definition=(definition(CDROM),)), "web1 vdc", "another drive vdc"),
    (
        "cannot-create-disk",
        creating(disks=tuple(replace(d, kind="block") for d in vm(ORIGINAL).disks)),
        "web1 vdc",
        "no disk that is a file",
    ),
    ("fenced-elsewhere", original(fence=fence("web9")), "web1", "failback status web9"),
    ("image-held", original(answer=HELD), "web1", "another process holds its image (vdb)"),
    ("lock-lost", original(fence=fence("web1", locked=("vda",), unlocked=("vdb",))), "web1", "lost its lock on vdb"),
    ("disk-missing", original(disks=(disk("vda", "/img/a.qcow2"),)), "web1 vdb", "no disk vdb any more"),
    (
        "disk-not-mapped",
        replica(disks=(*vm(REPLICA).disks, disk("vdc", "/img/rc.qcow2"))),
        "web1-replica vdc",
        "--exclude-disk vdc",
    ),
    ("disk-shared-between-sides", original_image(identity="file:/srv/dr/web1-b.qcow2"), "web1 vda", "both rest on"),
    ("disk-kind", replica_disk(kind="network", chain=()), "web1-replica vda", "is a network disk"),
    ("disk-shareable", original_disk(shareable=True), "web1 vda", "shareable"),
    ("disk-readonly", original_disk(readonly=True), "web1 vda", "read-only"),
    ("disk-unreadable", replica_disk(problem="permission denied.", chain=()), "web1-replica vda", "permission denied;"),
    ("disk-unreadable", replica_disk(chain=()), "web1-replica vda", "has no image"),
    ("format-not-supported", original_image(format="vmdk"), "web1 vda", "format vmdk"),
    ("image-encrypted", replica_image(encrypted=True), "web1-replica vda", "encrypted image"),
    ("image-corrupt", original_image(corrupt=True), "web1 vda", "marked corrupt"),
    ("image-dirty", original_image(dirty=True), "web1 vda", "not closed cleanly"),
    ("image-external-data", original_image(external_data=True), "web1 vda", "keeps its data in another file"),
    ("internal-snapshot", replica_image(internal_snapshots=2), "web1-replica vda", "2 snapshot(s) inside"),
    (
        "backing-chain",
        original_disk(chain=(image("/img/a.qcow2"), image("/img/base.qcow2"))),
        "web1 vda",
        "overlay on /img/base.qcow2",
    ),
    (
        "target-smaller",
        original_image(virtual_size_bytes=7 * GIB),
        "web1 vda",
        f"qemu-img resize /img/a.qcow2 {8 * GIB}",
    ),
    ("target-larger", original_image(virtual_size_bytes=9 * GIB), "web1 vda", "--allow-larger-target"),
    ("size-not-of-sectors", replica_image(virtual_size_bytes=8 * GIB - 100), "web1-replica vda", "not a multiple"),
    ("sector-differs", original_disk(sector_bytes=4096), "web1 vda", "logical_block_size"),
    ("no-room", replica_disk(free_bytes=GIB), "/img", f"has {GIB} bytes free in /img"),
    ("diverged", written_after(), "web1 vda", "--discard-divergence"),
]


@pytest.mark.parametrize(("code", "spoiled", "about", "words"), MET, ids=[f"{row[0]}-{n}" for n, row in enumerate(MET)])
def test_refusal_names_the_thing_and_the_cure(code: str, spoiled: Case, about: str, words: str) -> None:
    met = [refusal for refusal in find_refusals(spoiled) if refusal.code == code]
    assert len(met) == 1, [refusal.code for refusal in find_refusals(spoiled)]
    assert met[0].about == about
    assert words in met[0].sentence


@pytest.mark.parametrize("row", MET, ids=[f"{row[0]}-{n}" for n, row in enumerate(MET)])
def test_one_spoiled_thing_is_refused_once_and_for_its_own_reason(row: tuple[str, Case, str, str]) -> None:
    # One VM is bound to share its own disks; a source of odd size is smaller than its target as well.
    companions = {"same-vm": {"disk-shared-between-sides"}, "size-not-of-sectors": {"target-larger"}}
    codes = {refusal.code for refusal in find_refusals(row[1])}
    assert codes - companions.get(row[0], set()) == {row[0]}


def test_every_refusal_of_the_table_has_a_case_here() -> None:
    assert {rule.code for rule in RULES} == {row[0] for row in MET}
    assert len({rule.code for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("row", MET, ids=[f"{row[0]}-{n}" for n, row in enumerate(MET)])
def test_every_refusal_is_one_sentence_with_cause_and_cure(row: tuple[str, Case, str, str]) -> None:
    for refusal in find_refusals(row[1]):
        sentence = refusal.sentence
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "; " in sentence, "the cure stands behind a semicolon"
        assert "\n" not in sentence
        assert not re.search(r"[.!?] [A-Z]", sentence), "one sentence only"
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", refusal.code)


def test_a_healthy_pair_in_failover_is_not_refused() -> None:
    assert find_refusals(case()) == ()


def test_a_healthy_pair_with_firmware_variables_and_a_tpm_is_not_refused() -> None:
    assert find_refusals(both((NVRAM, TPM), (NVRAM, TPM), of={"firmware": "uefi", "has_tpm": True})) == ()


def test_a_missing_disk_that_is_to_be_created_is_not_refused() -> None:
    assert find_refusals(creating()) == ()


def test_all_refusals_come_at_once() -> None:
    spoiled = case(
        pair=replace(PAIR, state=State.READY),
        original=side(ORIGINAL, firmware="uefi", managed_save=True),
        replica=side(REPLICA, has_tpm=True, persistent=False),
    )
    codes = [refusal.code for refusal in find_refusals(spoiled)]
    assert codes == [
        "not-in-failover",
        "managed-save",
        "transient-vm",
        "machine-not-told",
        "machine-not-told",
        "firmware-differs",
        "tpm-differs",
    ]


def test_original_that_runs_is_accepted_when_its_power_off_was_asked_for() -> None:
    spoiled = original(power=Power.RUNNING)
    assert find_refusals(replace(spoiled, options=RunOptions(power_off_original=True))) == ()


def test_both_running_says_when_the_replica_took_over() -> None:
    spoiled = case(original=side(ORIGINAL, power=Power.RUNNING), failover_since="2026-01-02T03:04:05Z")
    (refusal,) = find_refusals(spoiled)
    assert "2026-01-02T03:04:05Z" in refusal.sentence


def test_larger_target_is_accepted_with_consent() -> None:
    spoiled = original_image(virtual_size_bytes=9 * GIB)
    assert find_refusals(replace(spoiled, options=RunOptions(allow_larger_target=True))) == ()


def test_smaller_target_is_refused_even_with_consent_to_a_larger_one() -> None:
    spoiled = replace(original_image(virtual_size_bytes=7 * GIB), options=RunOptions(allow_larger_target=True))
    assert [refusal.code for refusal in find_refusals(spoiled)] == ["target-smaller"]


def test_our_own_snapshots_jobs_and_fences_are_never_a_refusal() -> None:
    ours = SnapshotDescription(name="failback-web1-r1", ours=True, external=True)
    assert (
        find_refusals(
            case(
                original=side(ORIGINAL, fence=fence("web1", condition=Condition.TORN)),
                replica=side(REPLICA, snapshots=(ours,), job="backup", job_is_ours=True),
            )
        )
        == ()
    )


def test_a_restore_point_under_the_replica_is_never_a_refusal() -> None:
    assert find_refusals(replica_disk(chain=(image("/img/ra.overlay"), image("/img/ra.qcow2")))) == ()


def test_excluded_disks_and_devices_are_left_alone() -> None:
    pair = replace(PAIR, excluded=("vdc", "pci 0000:01:00.0"))
    extra = disk("vdc", "", kind="network", chain=(), shareable=True)
    found = side(REPLICA, disks=(*vm(REPLICA).disks, extra), passthrough=("pci 0000:01:00.0",))
    assert find_refusals(case(pair=pair, replica=found)) == ()


def test_a_running_guests_image_counts_as_dirty_and_is_no_refusal() -> None:
    assert find_refusals(replica_image(dirty=True)) == ()


def test_a_mapping_by_different_names_is_followed() -> None:
    pair = replace(PAIR, disks=(DiskPair(original="sda", replica="vda"), DiskPair(original="sdb", replica="vdb")))
    found = side(ORIGINAL, disks=(disk("sda", "/img/a.qcow2"), disk("sdb", "/img/b.qcow2")))
    assert find_refusals(case(pair=pair, original=found)) == ()


def test_room_is_summed_over_the_disks_of_one_folder() -> None:
    one = room_needed_bytes(disk("vda", "/img/ra.qcow2"), live=True)
    enough_for_one = tuple(disk(name, f"/img/{name}.qcow2", free_bytes=one) for name in ("vda", "vdb"))
    (refusal,) = find_refusals(replica(disks=enough_for_one))
    assert (refusal.code, f"{one} bytes free" in refusal.sentence, str(2 * one) in refusal.sentence) == (
        "no-room",
        True,
        True,
    )
    apart = (enough_for_one[0], disk("vdb", "/other/vdb.qcow2", free_bytes=one))
    assert find_refusals(replica(disks=apart)) == ()


def test_replica_that_is_off_needs_no_scratch_room() -> None:
    image_8_gib = disk("vda", "/img/ra.qcow2")
    assert room_needed_bytes(image_8_gib, live=False) == (1 << 20) + (1 << 20)
    assert room_needed_bytes(image_8_gib, live=True) == (2 << 20) + 8 * GIB // 10
    small = disk("vda", "/img/s.qcow2", chain=(image("/img/s.qcow2", virtual_size_bytes=1 << 20),))
    assert room_needed_bytes(small, live=True) == (2 << 20) + 128, "never more scratch than the disk has bytes"


def test_plan_says_that_no_bootable_original_remains_and_what_each_disk_rests_on() -> None:
    clean = case()
    plan = make_plan(clean.pair, clean.findings, clean.options)
    assert plan.refusals == ()
    assert [(line.original, line.replica, line.rung) for line in plan.disks] == [
        ("vda", "vda", "digests"),
        ("vdb", "vdb", "digests"),
    ]
    assert all("no earlier view of the replica is known to equal" in line.why_not_higher for line in plan.disks)
    assert any("no bootable copy of the original remains" in note for note in plan.notes)
    assert [step for step in plan.steps if "first pass" in step]


def test_plan_names_a_torn_original() -> None:
    pair = replace(PAIR, flag=replace(PAIR.flag, condition="torn"))
    spoiled = case(pair=pair)
    plan = make_plan(spoiled.pair, spoiled.findings, spoiled.options)
    assert any("torn already" in note for note in plan.notes)
