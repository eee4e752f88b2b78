"""The machines that the hypervisor tests run on, behind one seam: one in memory, one with libvirt and real guests."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import uuid as uuids
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from agent.virt.seam import Hypervisor, PowerState, StatePlace, StateRole, View
from tests.fakes.hypervisor import FakeHypervisor, FakeMachine, FakeView, GuestBehaviour
from tests.lab import console
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.guest import Guest

SIZE_BYTES = 4 * 1024 * 1024 + 512
Format = Literal["raw", "qcow2"]


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM of the tests: vda is qcow2, vdb raw, both in `folder`, alone."""

    uuid: str
    name: str
    folder: Path
    disks: dict[str, tuple[Path, Format]]

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def digests(self) -> dict[str, str]:
        return {target: digest(path) for target, (path, _) in self.disks.items()}


class Rig(Protocol):
    """What the tests need beside the seam: a machine to put VMs on, and the guest's own hands."""

    host: Hypervisor

    def fresh(self) -> Hypervisor:
        """The agent after a crash: another instance that knows nothing."""

    def vm(self, *, obeys: bool = True) -> Vm:
        """A VM that is off, with two disks."""

    def boot(self, vm: Vm) -> None:
        """Power on, and wait until the guest hears shutdown requests."""

    def let_guest_write(self, vm: Vm) -> None:
        """Returns when the guest has written to vda and vdb since."""

    def read_view(self, view: View, target: str) -> bytes:
        """The whole disk as the view has it."""

    def dirty(self, view: View, target: str) -> list[tuple[int, int]]:
        """What the view's dirty context lists: (offset, length) in bytes."""

    def lose_bitmap(self, vm: Vm, name: str) -> None:
        """Somebody removes a bitmap of the running VM's vda behind our back."""

    def bitmaps(self, vm: Vm) -> set[str]:
        """The names of the bitmaps in vda's image, of a VM that is off."""

    def add_foreign_checkpoint(self, vm: Vm, name: str) -> None:
        """Another tool makes a checkpoint of the running VM."""

    def kill(self, vm: Vm) -> None:
        """The hypervisor process dies by SIGKILL, or as good as that."""

    def pause(self, vm: Vm) -> None:
        """Pause the guest."""

    def set_console_password(self, vm: Vm, password: str) -> None:
        """The VM, which is off, gets a console with that password."""

    def give_state(self, vm: Vm) -> None:
        """The VM, which is off, gets UEFI firmware and a TPM."""

    def begin_foreign_backup(self, vm: Vm) -> None:
        """Someone else starts a pull-mode backup."""

    def end_foreign_backup(self, vm: Vm) -> None:
        """… and ends it."""


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


class FakeRig:
    """The rig on `FakeMachine`."""

    def __init__(self, folder: Path) -> None:
        (folder / "run").mkdir()
        self._folder = folder
        self.machine = FakeMachine(folder / "run")
        self._round = 0
        self.host: Hypervisor = FakeHypervisor(self.machine)

    def fresh(self) -> Hypervisor:
        return FakeHypervisor(self.machine)

    def vm(self, *, obeys: bool = True) -> Vm:
        folder = self._folder / "disks"
        folder.mkdir()
        disks: dict[str, tuple[Path, Format]] = {
            "vda": (folder / "system.qcow2", "qcow2"),
            "vdb": (folder / "data.raw", "raw"),
        }
        for path, _ in disks.values():
            path.write_bytes(bytes(SIZE_BYTES))
        guest = GuestBehaviour.OBEYS if obeys else GuestBehaviour.IGNORES
        domain = self.machine.define("contract", disks, guest=guest)
        return Vm(domain.uuid, domain.name, folder, disks)

    def boot(self, vm: Vm) -> None:
        self.host.power_on(vm.uuid)

    def let_guest_write(self, vm: Vm) -> None:
        self._round += 1
        for target in vm.disks:
            self.machine.guest_writes(vm.uuid, target, 4096, b"%16d" % self._round)

    def read_view(self, view: View, target: str) -> bytes:
        return self.machine.read_view(view, target)

    def dirty(self, view: View, target: str) -> list[tuple[int, int]]:
        return self.machine.dirty(view, target)

    def lose_bitmap(self, vm: Vm, name: str) -> None:
        del self.machine.domains[vm.uuid].disks["vda"].bitmaps[name]

    def bitmaps(self, vm: Vm) -> set[str]:
        return set(self.machine.domains[vm.uuid].disks["vda"].bitmaps)

    def add_foreign_checkpoint(self, vm: Vm, name: str) -> None:
        domain = self.machine.domains[vm.uuid]
        domain.foreign_checkpoints += (name,)
        domain.disks["vda"].bitmaps[name] = []

    def kill(self, vm: Vm) -> None:
        self.machine.domains[vm.uuid].end(killed=True)

    def pause(self, vm: Vm) -> None:
        self.machine.domains[vm.uuid].state = PowerState.PAUSED

    def set_console_password(self, vm: Vm, password: str) -> None:
        self.machine.domains[vm.uuid].password = password

    def give_state(self, vm: Vm) -> None:
        domain = self.machine.domains[vm.uuid]
        domain.firmware, domain.has_tpm = "uefi", True
        nvram, tpm = self._folder / "web_VARS.fd", self._folder / "tpm2"
        nvram.write_bytes(b"variables")
        tpm.mkdir()
        (tpm / "tpm2-00.permall").write_bytes(b"keys")
        domain.state_places = (
            StatePlace(role=StateRole.NVRAM, path=nvram, format="raw"),
            StatePlace(role=StateRole.TPM, path=tpm, format="2.0"),
        )

    def begin_foreign_backup(self, vm: Vm) -> None:
        self.machine.domains[vm.uuid].view = FakeView(None, {})

    def end_foreign_backup(self, vm: Vm) -> None:
        self.machine.domains[vm.uuid].view = None


class LibvirtRig:
    """The rig on libvirt's embedded driver, with guests that boot."""

    def __init__(self, administrator: Any, guest: Guest, folder: Path) -> None:
        from agent.virt.libvirt_host import LibvirtHost

        self._make = partial(LibvirtHost, administrator.getURI(), scratch_dir=folder / "scratch")
        self._administrator = administrator
        self._root = Path(administrator.getURI().partition("root=")[2])
        self._guest = guest
        self._folder = folder
        self._domains: list[Any] = []
        self._hosts: list[Hypervisor] = []
        self.host = self.fresh()

    def fresh(self) -> Hypervisor:
        self._hosts.append(self._make())
        return self._hosts[-1]

    def vm(self, *, obeys: bool = True) -> Vm:
        folder = self._folder / "disks"
        folder.mkdir()
        disks: dict[str, tuple[Path, Format]] = {
            "vda": (folder / "system.qcow2", "qcow2"),
            "vdb": (folder / "data.raw", "raw"),
        }
        for path, image_format in disks.values():
            command = ["qemu-img", "create", "-q", "-f", image_format, str(path), str(SIZE_BYTES)]
            subprocess.run(command, check=True)
        return self.define(folder, disks, obeys=obeys)

    def define(self, folder: Path, disks: dict[str, tuple[Path, Format]], *, obeys: bool = True) -> Vm:
        """A VM with these disks, which exist."""
        uuid = str(uuids.uuid4())
        lab_disks = [LabDisk(target, path, image_format) for target, (path, image_format) in disks.items()]
        xml = domain_xml(f"contract-{uuid[:8]}", uuid, lab_disks, self._guest, self._log, ignore_acpi=not obeys)
        extra = "<metadata><app:note xmlns:app='http://example.org/app'>keep me</app:note></metadata>"
        self._domains.append(self._administrator.defineXML(xml.replace("<os>", f"{extra}<os>", 1)))
        return Vm(uuid, f"contract-{uuid[:8]}", folder, disks)

    @property
    def _log(self) -> Path:
        return self._folder / "console.log"

    def boot(self, vm: Vm) -> None:
        said = len(console.read(self._log))
        self.host.power_on(vm.uuid)
        console.wait_ready(self._log, 120, after=said)

    def let_guest_write(self, vm: Vm) -> None:
        for target in vm.disks:
            console.wait_for_writes(self._log, target, 2)

    def read_view(self, view: View, target: str) -> bytes:
        handle: Any = importlib.import_module("nbd").NBD()
        handle.set_export_name(view.exports[target])
        handle.connect_unix(str(view.socket))
        try:
            content: bytearray = handle.pread(handle.get_size(), 0)
            return bytes(content)
        finally:
            handle.shutdown()

    def dirty(self, view: View, target: str) -> list[tuple[int, int]]:
        handle: Any = importlib.import_module("nbd").NBD()
        context = view.dirty_contexts[target]
        handle.set_export_name(view.exports[target])
        handle.add_meta_context(context)
        handle.connect_unix(str(view.socket))
        found: list[tuple[int, int]] = []

        def told(name: str, offset: int, entries: list[int], _error: int) -> int:
            for length, flags in zip(entries[::2], entries[1::2], strict=True) if name == context else ():
                if flags & 1:
                    found.append((offset, length))
                offset += length
            return 0

        try:
            handle.block_status(handle.get_size(), 0, told)
            return found
        finally:
            handle.shutdown()

    def lose_bitmap(self, vm: Vm, name: str) -> None:
        monitor = importlib.import_module("libvirt_qemu").qemuMonitorCommand
        domain = self._administrator.lookupByUUIDString(vm.uuid)
        nodes = json.loads(monitor(domain, '{"execute": "query-named-block-nodes"}', 0))["return"]
        node = next(n["node-name"] for n in nodes if name in [b.get("name") for b in n.get("dirty-bitmaps", ())])
        order = {"execute": "block-dirty-bitmap-remove", "arguments": {"node": node, "name": name}}
        assert "error" not in json.loads(monitor(domain, json.dumps(order), 0))

    def bitmaps(self, vm: Vm) -> set[str]:
        command = ["qemu-img", "info", "-U", "--output=json", str(vm.disks["vda"][0])]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return {bitmap["name"] for bitmap in told["format-specific"]["data"].get("bitmaps", ())}

    def add_foreign_checkpoint(self, vm: Vm, name: str) -> None:
        xml = f"<domaincheckpoint><name>{name}</name></domaincheckpoint>"
        self._administrator.lookupByUUIDString(vm.uuid).checkpointCreateXML(
            xml.replace("</name>", "</name><disks><disk name='vda' checkpoint='bitmap'/></disks>"), 0
        )

    def kill(self, vm: Vm) -> None:
        # Not libvirt's destroy, which lets QEMU save its bitmaps first.
        domain = self._administrator.lookupByUUIDString(vm.uuid)
        pid = int((self._root / "run/qemu" / f"{domain.name()}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        assert self.host.wait_off(vm.uuid, 60)

    def pause(self, vm: Vm) -> None:
        self._administrator.lookupByUUIDString(vm.uuid).suspend()

    def set_console_password(self, vm: Vm, password: str) -> None:
        console = f"<graphics type='vnc' passwd='{password}'/>"
        self.redefine(self.inactive_xml(vm).replace("</devices>", f"{console}</devices>"))

    def give_state(self, vm: Vm) -> None:
        tpm = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"
        xml = self.inactive_xml(vm).replace("<os>", "<os firmware='efi'>").replace("</devices>", f"{tpm}</devices>")
        self.redefine(xml)

    def begin_foreign_backup(self, vm: Vm) -> None:
        socket = self._folder / "someone-elses.sock"
        xml = f"""<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>
            <disk name='vda' backup='yes' type='file'><scratch file='{vm.folder}/someone-elses.scratch'/></disk>
            <disk name='vdb' backup='no'/></disks></domainbackup>"""
        self._administrator.lookupByUUIDString(vm.uuid).backupBegin(xml, None, 0)

    def end_foreign_backup(self, vm: Vm) -> None:
        self._administrator.lookupByUUIDString(vm.uuid).abortJob()

    def inactive_xml(self, vm: Vm) -> str:
        import libvirt

        text: str = self._administrator.lookupByUUIDString(vm.uuid).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        return text

    def redefine(self, xml: str) -> None:
        self._administrator.defineXML(xml)

    def forget_snapshots(self, vm: Vm) -> None:
        import libvirt

        for snapshot in self._administrator.lookupByUUIDString(vm.uuid).listAllSnapshots(0):
            snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)

    def save_memory(self, vm: Vm) -> None:
        self._administrator.lookupByUUIDString(vm.uuid).managedSave(0)

    def begin_block_copy(self, vm: Vm) -> None:
        import libvirt

        xml = f"<disk type='file'><source file='{vm.folder}/copy.qcow2'/><driver type='qcow2'/></disk>"
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        self._administrator.lookupByUUIDString(vm.uuid).blockCopy("vda", xml, {}, flags)

    def take_foreign_snapshot(self, vm: Vm, target: str, overlay: Path) -> None:
        """Someone else takes an external snapshot of that disk of the running VM, and keeps no metadata of it."""
        import libvirt

        others = "".join(f"<disk name='{other}' snapshot='no'/>" for other in vm.disks if other != target)
        xml = f"""<domainsnapshot><disks>{others}<disk name='{target}' snapshot='external'>
            <driver type='qcow2'/><source file='{overlay}'/></disk></disks></domainsnapshot>"""
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        self._administrator.lookupByUUIDString(vm.uuid).snapshotCreateXML(xml, flags)

    def dispose(self) -> None:
        import libvirt

        for domain in self._domains:
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            )
        for host in self._hosts:
            host.close()
