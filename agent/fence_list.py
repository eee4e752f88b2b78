"""The list of fenced VMs that libvirt's hook reads (`agent.fence_hook`), beside the ledger: small, plain, durable.

The ledger keeps it: written before a fence is in the ledger and after one is out of it, so that whatever the ledger
says is fenced is in the list, and a crash leaves an entry too many. Opening the ledger writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from agent.durable import replace_whole
from agent.fence_record import FenceRecord

LIST_NAME = "fenced.json"
PROBE_NAME = "fence-probe.json"


def list_text(entries: Iterable[dict[str, object]]) -> str:
    """The file as it is written."""
    return json.dumps({"fences": list(entries)}, indent=1, sort_keys=True)


def entry(fence: FenceRecord, condition: str) -> dict[str, object]:
    """One fence in it; `condition`: of the VM's disks."""
    return {
        "vm_uuid": fence.vm_uuid,
        "vm_name": fence.vm_name,
        "pair": fence.pair,
        "run": fence.run,
        "side": fence.side,
        "condition": condition,
        "images": [
            {"path": str(image.path), "kind": "exclusive" if image.is_exclusive else "frozen"} for image in fence.images
        ],
    }


def write_list(folder: Path, text: str, *, name: str = LIST_NAME) -> None:
    """Write it durably; no write where it says so already. Raises `OSError`."""
    path = folder / name
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    replace_whole(path, text)
