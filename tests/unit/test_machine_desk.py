"""The agent's part: state put in place and given back, definitions changed, disks created, and crashes in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from agent import machine_files as files
from agent.errors import AgentError, HypervisorError, StaleEpoch
from agent.fences import NotFenced
from agent.machine_book import KeptState, MachineBook, MachineBookError, MachineRecord
from agent.machine_files import StateError
from agent.virt.domain_xml import parse_domain
from agent.virt.seam import PowerState, StatePlace, StateRole
from protocol.messages import (
    ChangeDefinition,
    CreateDisk,
    DefinitionChange,
    DescribeMachine,
    DiskCreated,
    FenceDescription,
    FenceVm,
    KeepMachine,
    ListState,
    MachineDescription,
    MachineShare,
    PlaceState,
    ReadState,
    RestoreMachine,
    Side,
    StateChunk,
    StateFile,
    StateFiles,
    StateKind,
    WriteState,
)
from tests.unit.agent_house import AgentHouse, is_locked, open_house, order

PERMALL = "tpm2-00.permall"
NEW = {(StateKind.NVRAM, "vars"): b"new variables", (StateKind.TPM, PERMALL): b"new keys"}
MEMORY = "<memory unit='KiB'>262144</memory>"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as made:
        nvram, tpm = tmp_path / "nvram" / "web_VARS.fd", tmp_path / "swtpm" / "tpm2"
        nvram.parent.mkdir()
        nvram.write_bytes(b"old variables")
        nvram.chmod(0o640)
        tpm.mkdir(parents=True, mode=0o700)
        (tpm / ".lock").touch()
        (tpm / PERMALL).write_bytes(b"old keys")
        made.vm.state_places = (
            StatePlace(role=StateRole.NVRAM, path=nvram, format="raw"),
            StatePlace(role=StateRole.TPM, path=tpm, format="2.0"),
        )
        yield made


def nvram_of(house: AgentHouse) -> Path:
    return house.vm.state_places[0].path


def tpm_of(house: AgentHouse) -> Path:
    return house.vm.state_places[1].path


def file(kind: StateKind, name: str, data: bytes) -> StateFile:
    return StateFile(kind=kind, name=name, size_bytes=len(data), digest=blake3(data).digest())


def listed(state: dict[tuple[StateKind, str], bytes]) -> tuple[StateFile, ...]:
    return tuple(file(kind, name, data) for (kind, name), data in state.items())


async def send(house: AgentHouse, state: dict[tuple[StateKind, str], bytes] = NEW, *, run: str = "r1") -> None:
    for (kind, name), data in state.items():
        for offset in range(0, len(data), 5):
            request = WriteState(
                order=order(run=run),
                vm_uuid=house.vm.uuid,
                kind=kind,
                name=name,
                offset_bytes=offset,
                data=data[offset : offset + 5],
            )
            await house.ask(request)


async def place(house: AgentHouse, *, run: str = "r1") -> StateFiles:
    await house.fence()
    await send(house, run=run)
    reply = await house.ask(PlaceState(order=order(run=run), vm_uuid=house.vm.uuid, files=listed(NEW)))
    assert isinstance(reply, StateFiles)
    return reply


async def restore(house: AgentHouse, share: MachineShare, *, run: str = "r1") -> None:
    await house.ask(RestoreMachine(order=order(run=run), vm_uuid=house.vm.uuid, share=share))


def assert_old_state(house: AgentHouse) -> None:
    assert nvram_of(house).read_bytes() == b"old variables"
    assert nvram_of(house).stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tpm_of(house).iterdir()} == {".lock", PERMALL}
    assert (tpm_of(house) / PERMALL).read_bytes() == b"old keys"
    assert not list(house.folder.rglob("*failback*"))


# --- state --------------------------------------------------------------------------------------------------------


async def test_state_is_described_without_a_fence(house: AgentHouse) -> None:
    told = await house.ask(DescribeMachine(vm_uuid=house.vm.uuid))
    assert isinstance(told, MachineDescription)
    assert [(part.kind, part.size_bytes, part.present) for part in told.parts] == [
        (StateKind.NVRAM, 13, True),
        (StateKind.TPM, 8, True),
    ]
    assert "".join(told.definition) == house.service.hypervisor.definition(house.vm.uuid)


async def test_state_is_read_of_a_fenced_replica_alone(house: AgentHouse) -> None:
    read = ReadState(order=order(), vm_uuid=house.vm.uuid, kind=StateKind.NVRAM, name="vars", offset_bytes=4)
    with pytest.raises(NotFenced):
        await house.ask(read)
    with pytest.raises(NotFenced):
        await house.ask(ListState(order=order(), vm_uuid=house.vm.uuid))
    await house.fence(Side.REPLICA)
    assert await house.ask(read) == StateChunk(data=b"variables")
    told = await house.ask(ListState(order=order(), vm_uuid=house.vm.uuid))
    assert told == StateFiles(
        files=(file(StateKind.NVRAM, "vars", b"old variables"), file(StateKind.TPM, PERMALL, b"old keys"))
    )


async def test_new_state_has_owner_and_mode_of_the_old_which_is_kept_beside_it(house: AgentHouse) -> None:
    before = nvram_of(house).stat()
    placed = await place(house)
    assert set(placed.files) == set(listed(NEW))
    assert nvram_of(house).read_bytes() == b"new variables"
    after = nvram_of(house).stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert {path.name for path in tpm_of(house).iterdir()} == {PERMALL}
    assert nvram_of(house).with_name("web_VARS.fd.failback-r1").read_bytes() == b"old variables"
    assert (tpm_of(house).with_name("tpm2.failback-r1") / PERMALL).read_bytes() == b"old keys"


async def test_restored_twice_the_old_state_is_there_and_nothing_of_ours(house: AgentHouse) -> None:
    await place(house)
    nvram_of(house).write_bytes(b"written by the original's own guest")
    await restore(house, MachineShare.STATE)
    await restore(house, MachineShare.STATE)
    assert_old_state(house)


async def test_placed_twice_the_old_state_is_still_what_is_given_back(house: AgentHouse) -> None:
    await place(house)
    await place(house)
    await restore(house, MachineShare.STATE)
    assert_old_state(house)


async def test_kept_the_new_state_stays_and_the_old_is_gone(house: AgentHouse) -> None:
    await place(house)
    await house.ask(KeepMachine(order=order(), vm_uuid=house.vm.uuid))
    await restore(house, MachineShare.STATE)
    assert nvram_of(house).read_bytes() == b"new variables"
    assert not list(house.folder.rglob("*failback*"))


async def test_where_there_was_no_state_there_is_none_again(house: AgentHouse) -> None:
    nvram_of(house).unlink()
    for path in tpm_of(house).iterdir():
        path.unlink()
    tpm_of(house).rmdir()
    tpm_of(house).parent.rmdir()
    await place(house)
    assert (tpm_of(house) / PERMALL).read_bytes() == b"new keys"
    await restore(house, MachineShare.STATE)
    assert not nvram_of(house).exists()
    assert not tpm_of(house).exists()


async def test_what_did_not_arrive_whole_changes_nothing(house: AgentHouse) -> None:
    await house.fence()
    await send(house, {(StateKind.NVRAM, "vars"): b"new vari"})
    with pytest.raises(StateError, match="did not arrive whole"):
        await house.ask(PlaceState(order=order(), vm_uuid=house.vm.uuid, files=listed(NEW)))
    assert_old_state(house)


@pytest.mark.parametrize(
    ("kind", "name", "offset"),
    [
        (StateKind.NVRAM, "other", 0),
        (StateKind.TPM, "../evil", 0),
        (StateKind.TPM, ".lock", 0),
        (StateKind.TPM, "/etc/passwd", 0),
        (StateKind.TPM, PERMALL, 7),
        (StateKind.TPM, PERMALL, -1),
    ],
)
async def test_a_name_or_a_place_that_cannot_be_is_refused(
    house: AgentHouse, kind: StateKind, name: str, offset: int
) -> None:
    await house.fence()
    request = WriteState(order=order(), vm_uuid=house.vm.uuid, kind=kind, name=name, offset_bytes=offset, data=b"x")
    with pytest.raises(StateError):
        await house.ask(request)


async def test_more_than_64_mib_are_not_taken(house: AgentHouse) -> None:
    await house.fence()
    with nvram_of(house).open("r+b") as store:
        store.truncate(files.MAX_STATE_BYTES + 1)
    with pytest.raises(StateError, match="more than 64 MiB"):
        await house.ask(ListState(order=order(), vm_uuid=house.vm.uuid))


async def test_a_link_in_the_tpms_folder_is_not_followed(house: AgentHouse) -> None:
    (tpm_of(house) / PERMALL).unlink()
    (tpm_of(house) / PERMALL).symlink_to("/etc/hostname")
    await house.fence(Side.REPLICA)
    with pytest.raises(StateError, match="no ordinary file"):
        await house.ask(ListState(order=order(), vm_uuid=house.vm.uuid))


async def test_state_that_cannot_be_carried_is_not(house: AgentHouse) -> None:
    nvram, tpm = house.vm.state_places
    house.vm.state_places = (nvram, replace(tpm, problem="the state of its TPM is encrypted"))
    with pytest.raises(StateError, match="encrypted"):
        await place(house)
    assert (tpm_of(house) / PERMALL).read_bytes() == b"old keys"


async def test_a_lower_epoch_is_refused(house: AgentHouse) -> None:
    await house.fence(epoch=3)
    with pytest.raises(StaleEpoch):
        await house.ask(KeepMachine(order=order(2), vm_uuid=house.vm.uuid))


class Died(BaseException):
    """The agent's process ends here."""


@pytest.mark.parametrize("role", list(StateRole))
def test_killed_between_any_two_acts_the_old_state_comes_back(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch, role: StateRole
) -> None:
    where = next(place for place in house.vm.state_places if place.role is role)
    name = "vars" if role is StateRole.NVRAM else PERMALL
    kept = where.path.with_name(f"{where.path.name}.failback-r1")
    state = KeptState(role=role, path=where.path, kept=kept, existed=True, placed=())
    fsync, places, deaths = os.fsync, 0, 0
    while True:
        places += 1
        left = places

        def dying(fd: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Died
            fsync(fd)

        monkeypatch.setattr(os, "fsync", dying)
        try:
            files.keep_aside(state)
            files.put_in_place(state, {name: b"new"})
        except Died:
            deaths += 1
            monkeypatch.setattr(os, "fsync", fsync)
            files.give_back(state)
            assert_old_state(house)
            continue
        monkeypatch.setattr(os, "fsync", fsync)
        break
    assert deaths >= 3
    files.give_back(state)
    assert_old_state(house)


# --- another run ---------------------------------------------------------------------------------------------------


async def fence_for(house: AgentHouse, run: str) -> None:
    request = FenceVm(order=order(run=run), vm_uuid=house.vm.uuid, side=Side.ORIGINAL, targets=("vda",))
    assert isinstance(await house.ask(request), FenceDescription)


async def test_the_next_run_gives_back_what_the_one_before_could_not(house: AgentHouse) -> None:
    await place(house)
    await house.ask(ChangeDefinition(order=order(), vm_uuid=house.vm.uuid, changes=(DefinitionChange(element=MEMORY),)))
    await fence_for(house, "r2")
    assert_old_state(house)
    assert "131072" in house.vm.hardware


async def test_the_next_run_leaves_what_somebody_has_changed_since(house: AgentHouse) -> None:
    await place(house)
    await house.ask(ChangeDefinition(order=order(), vm_uuid=house.vm.uuid, changes=(DefinitionChange(element=MEMORY),)))
    nvram_of(house).write_bytes(b"used since")
    house.vm.hardware = "<memory unit='KiB'>999</memory>"
    await fence_for(house, "r2")
    assert nvram_of(house).read_bytes() == b"used since"
    assert house.vm.hardware == "<memory unit='KiB'>999</memory>"
    assert not list(house.folder.rglob("*failback*"))


async def test_the_next_run_gives_a_tpms_state_back_that_was_only_moved_aside(house: AgentHouse) -> None:
    kept = tpm_of(house).with_name("tpm2.failback-r1")
    state = KeptState(role=StateRole.TPM, path=tpm_of(house), kept=kept, existed=True, placed=((PERMALL, "00"),))
    house.service.machine.book.put(MachineRecord(vm_uuid=house.vm.uuid, pair="web", run="r1", states=(state,)))
    files.keep_aside(state)
    await fence_for(house, "r2")
    assert_old_state(house)


# --- definition and disks --------------------------------------------------------------------------------------------


def change(*elements: str) -> ChangeDefinition:
    changes = tuple(DefinitionChange(element=element) for element in elements)
    return ChangeDefinition(order=order(), vm_uuid="", changes=changes)


async def test_a_definition_is_changed_and_given_back_with_its_secrets(house: AgentHouse) -> None:
    house.vm.password = "secret"
    before = house.service.hypervisor.definition(house.vm.uuid, secrets=True)
    await house.fence()
    for _ in range(2):  # the second time it is still the first one that is changed
        await house.ask(replace(change(MEMORY), vm_uuid=house.vm.uuid))
        assert "262144" in house.vm.hardware
        assert house.vm.password == "secret"
    await restore(house, MachineShare.DEFINITION)
    assert house.service.hypervisor.definition(house.vm.uuid, secrets=True) == before


async def test_a_definition_is_changed_of_a_fenced_original_alone(house: AgentHouse) -> None:
    with pytest.raises(NotFenced):
        await house.ask(replace(change(MEMORY), vm_uuid=house.vm.uuid))


def create(house: AgentHouse, **changes: object) -> CreateDisk:
    plain = CreateDisk(
        order=order(),
        vm_uuid=house.vm.uuid,
        target="vdb",
        format="raw",
        size_bytes=3 << 20,
        element="<disk><target dev='vdb' bus='virtio'/></disk>",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_created_disk_is_sparse_beside_the_first_and_like_it(house: AgentHouse, image_format: str) -> None:
    house.image.chmod(0o664)
    made = await house.ask(create(house, format=image_format))
    assert await house.ask(create(house, format=image_format)) == made
    assert isinstance(made, DiskCreated)
    path = Path(made.path)
    assert path == house.folder / f"web-vdb-r1.{image_format}"
    found = os.stat(path)  # noqa: PTH116
    assert found.st_mode & 0o777 == 0o664
    assert found.st_blocks * 512 < 1 << 20
    facts = parse_domain(house.service.hypervisor.definition(house.vm.uuid)).disk("vdb")
    assert facts is not None
    assert facts.image is not None
    assert (facts.image.path, facts.image.format) == (path, image_format)


async def test_a_created_disk_that_is_fenced_is_removed_and_nothing_else(house: AgentHouse) -> None:
    before = house.service.hypervisor.definition(house.vm.uuid, secrets=True)
    there = {path.name for path in house.folder.iterdir()}
    made = await house.ask(create(house))
    assert isinstance(made, DiskCreated)
    await house.ask(FenceVm(order=order(), vm_uuid=house.vm.uuid, side=Side.ORIGINAL, targets=("vda", "vdb")))
    assert is_locked(Path(made.path))
    seen = house.service.maps.path_of(house.vm.uuid, "vdb")
    seen.parent.mkdir(exist_ok=True)
    seen.touch()
    for _ in range(2):
        await restore(house, MachineShare.DISKS)
        assert house.service.hypervisor.definition(house.vm.uuid, secrets=True) == before
        assert {path.name for path in house.folder.iterdir()} == there
    assert not seen.exists(), "what was known of the disk goes with it"
    assert is_locked(house.image)
    fence = house.service.fences.fence_of(house.vm.uuid)
    assert fence is not None
    assert {image.target for image in fence.images} == {"vda"}


async def test_another_runs_word_removes_no_disk(house: AgentHouse) -> None:
    made = await house.ask(create(house))
    assert isinstance(made, DiskCreated)
    await restore(house, MachineShare.DISKS, run="r9")
    assert made.path in {str(path) for path in house.folder.iterdir()}


async def test_no_disk_is_created_over_a_file_that_is_there(house: AgentHouse) -> None:
    (house.folder / "web-vdb-r1.raw").write_bytes(b"precious")
    with pytest.raises(HypervisorError, match="in the way"):
        await house.ask(create(house))
    await restore(house, MachineShare.DISKS)
    assert (house.folder / "web-vdb-r1.raw").read_bytes() == b"precious"


@pytest.mark.parametrize("wrong", [{"format": "vmdk"}, {"size_bytes": 0}, {"element": "<disk"}])
async def test_a_disk_that_cannot_be_is_not_created(house: AgentHouse, wrong: dict[str, object]) -> None:
    with pytest.raises(AgentError):
        await house.ask(create(house, **wrong))
    await restore(house, MachineShare.DISKS)
    assert not list(house.folder.glob("web-vdb*"))


async def test_nothing_is_done_to_a_running_vm(house: AgentHouse) -> None:
    house.vm.state = PowerState.RUNNING
    with pytest.raises(HypervisorError, match="power it off"):
        await house.ask(create(house))


def test_a_damaged_book_is_told_and_not_taken_for_none(tmp_path: Path) -> None:
    book = MachineBook(tmp_path)
    (tmp_path / "u.json").write_text("{")
    with pytest.raises(MachineBookError, match="move it away"):
        book.find("u")
    (tmp_path / "u.json").write_text('{"version": 9}')
    with pytest.raises(MachineBookError, match="version 9"):
        book.find("u")
