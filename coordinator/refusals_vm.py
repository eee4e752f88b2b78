"""The refusals that concern one of the VMs, or both; listed in the table of `coordinator.refusals`."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.cures import register_again
from coordinator.divergence import since_when
from coordinator.findings import NO_VM, SIDES, Case, Problem, VmCase, clause, held_images
from protocol.messages import Power, Side, VmDescription

Objection = tuple[str, str]


def vm_gone(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        vm = case.found(side).vm
        ref = case.ref(side)
        if isinstance(vm, Problem) and vm.code == NO_VM:
            yield (
                ref.name,
                f"Host {ref.host} no longer knows the {side.value} {ref.name} (UUID {ref.uuid}); define it there again "
                f"by that name, and if its UUID is another one then, register the pair again: "
                f"`{register_again(case)}`.",
            )


def vm_unreadable(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        vm = case.found(side).vm
        ref = case.ref(side)
        if isinstance(vm, Problem) and vm.code != NO_VM:
            yield (
                ref.name,
                f"Host {ref.host} could not inspect the {side.value} {ref.name}: {clause(vm.sentence)}; mend that and "
                "plan again.",
            )


def vm_redefined(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        vm = case.found(side).vm
        ref = case.ref(side)
        if isinstance(vm, VmDescription) and vm.uuid != ref.uuid:
            yield (
                ref.name,
                f"The {side.value} {ref.name} on {ref.host} has UUID {vm.uuid} but was registered with "
                f"{ref.uuid}, so it "
                "is another VM or was redefined; if this is the right one, register the pair again: "
                f"`{register_again(case)}`.",
            )


def same_vm(case: Case) -> Iterator[Objection]:
    original, replica = case.pair.original, case.pair.replica
    if original.host == replica.host and original.uuid == replica.uuid:
        yield (
            original.name,
            f"Original and replica of pair {case.pair.name} are the same VM ({original.name} on {original.host}); "
            "register the pair again with two different VMs.",
        )


def both_running(case: Case) -> Iterator[Objection]:
    original, replica = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA)
    if original is None or replica is None or case.options.power_off_original:
        return
    if original.vm.power is Power.RUNNING:
        since = since_when(case)
        beside = (
            "and the replica run at once" if replica.vm.power is Power.RUNNING else "runs while its replica is newest"
        )
        yield (
            original.ref.name,
            f"The {original.title} {beside} ({since}), and everything it wrote itself would be overwritten; save "
            "what you "
            "need of it, then power it off or start with --power-off-original (--yes does not imply it).",
        )


def original_not_off(case: Case) -> Iterator[Objection]:
    vm = case.vm(Side.ORIGINAL)
    if vm is not None and vm.vm.power not in (Power.RUNNING, Power.OFF):
        yield (
            vm.ref.name,
            f"The {vm.title} is {vm.vm.power.value}, so it holds its disks without answering a shutdown; end it with "
            f"`virsh destroy --graceful {vm.ref.name}` there.",
        )


def replica_not_serving(case: Case) -> Iterator[Objection]:
    vm = case.vm(Side.REPLICA)
    if vm is not None and vm.vm.power not in (Power.RUNNING, Power.OFF):
        cure = {
            Power.PAUSED: f"resume it with `virsh resume {vm.ref.name}`",
            Power.SUSPENDED: f"wake it with `virsh dompmwakeup {vm.ref.name}`",
            Power.SHUTTING_DOWN: "wait until it is off",
        }.get(vm.vm.power, f"end it with `virsh destroy --graceful {vm.ref.name}`, then start it")
        yield vm.ref.name, f"The {vm.title} is {vm.vm.power.value} and cannot be shut down cleanly; {cure} there."


def managed_save(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        if vm.vm.managed_save:
            yield (
                vm.ref.name,
                f"The {vm.title} has a managed save, whose old memory would be resumed over new disks; drop it with "
                f"`virsh managedsave-remove {vm.ref.name}` there.",
            )


def transient(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        if not vm.vm.persistent:
            yield (
                vm.ref.name,
                f"The {vm.title} is transient and would vanish when it is powered off; make it persistent there with "
                f"`virsh dumpxml {vm.ref.name} > {vm.ref.name}.xml` and `virsh define {vm.ref.name}.xml`.",
            )


def restarts_on_poweroff(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        if vm.vm.on_poweroff != "destroy":
            yield (
                vm.ref.name,
                f"The {vm.title} has on_poweroff={vm.vm.on_poweroff}, so a shutdown would not leave it off; set "
                f"<on_poweroff>destroy</on_poweroff> with `virsh edit {vm.ref.name}` there.",
            )


def foreign_job(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        if vm.vm.job is not None and not vm.vm.job_is_ours:
            yield (
                vm.ref.name,
                f"The {vm.title} has a job that is not ours ({vm.vm.job}); let it finish or end it with "
                f"`virsh domjobabort {vm.ref.name}` or `virsh blockjob` there.",
            )


def foreign_checkpoint(case: Case) -> Iterator[Objection]:
    vm = case.vm(Side.REPLICA)
    if vm is not None and vm.vm.checkpoints:
        names = ", ".join(vm.vm.checkpoints)
        yield (
            vm.ref.name,
            f"The {vm.title} has checkpoints of another tool ({names}), and libvirt refuses the protective "
            "snapshot while "
            f"they exist; delete them there with `virsh checkpoint-delete {vm.ref.name} NAME`.",
        )


def user_snapshot(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        names = ", ".join(snapshot.name for snapshot in vm.vm.snapshots if not snapshot.ours)
        if names:
            yield (
                vm.ref.name,
                f"The {vm.title} has snapshots that are not ours ({names}) and that a failback would break; delete or "
                f"merge them there with `virsh snapshot-delete {vm.ref.name} NAME`.",
            )


def passthrough(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        for device in vm.vm.passthrough:
            if device not in case.pair.excluded:
                yield (
                    f"{vm.ref.name} {device}",
                    f"The {vm.title} uses the host device {device}, whose data could not be copied; detach it, or if "
                    f"it holds none, leave it out: `{register_again(case, leave_out=device)}`.",
                )


def fenced_elsewhere(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        fence = vm.vm.fence
        if fence is not None and fence.pair != case.pair.name:
            yield (
                vm.ref.name,
                f"The {vm.title} is fenced by pair {fence.pair} (run {fence.run}); end that pair's run first "
                f"(`failback status {fence.pair}`).",
            )


def image_held(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        held = held_images(vm.power, {disk.disk.target for disk in case.mapped(vm.side)}) if vm.power else ()
        if vm.vm.power is Power.OFF and held:
            yield (
                vm.ref.name,
                f"The {vm.title} is off but another process holds its image ({', '.join(held)}); find it there "
                "with `fuser` or `lslocks` and end it.",
            )


def lock_lost(case: Case) -> Iterator[Objection]:
    for vm in _fenced_by_us(case):
        fence = vm.vm.fence
        if fence is not None and fence.unlocked:
            yield (
                vm.ref.name,
                f"The fence of the {vm.title} lost its lock on {', '.join(fence.unlocked)} because another "
                "process took "
                "the image; end that process there and restart failback-agent.",
            )


def _fenced_by_us(case: Case) -> Iterator[VmCase]:
    for vm in case.vms():
        if vm.vm.fence is not None and vm.vm.fence.pair == case.pair.name:
            yield vm
