"""That a person lifted a fence by hand, as the ledger keeps it until a run has fenced and released the VM again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftRecord:
    """Who lifted the fence of a VM, when and why, and what it was.

    Attributes:
        vm_uuid, vm_name: the VM.
        pair, run, side: whose fence it was.
        condition: the flag of its disks at that moment.
        by: the user on this host.
        reason: in their words.
        at_s: when, seconds since 1970.
        autostart_due: libvirt did not answer then; autostart is given back as soon as it does.
    """

    vm_uuid: str
    vm_name: str
    pair: str
    run: str
    side: str
    condition: str
    by: str
    reason: str
    at_s: float
    autostart_due: bool = False
