"""Puts libvirt's qemu hook (`agent.fence_hook`) into place, and proves that libvirt obeys it. All of it blocks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from agent import fence_hook
from agent.config import Config
from agent.errors import AgentError
from agent.fence_list import PROBE_NAME, list_text, write_list
from agent.virt.probe import refusal_of_probe
from protocol.messages import HookState

HOOK_NAME = "failback-fence"
INTERPRETER = "/usr/bin/python3 -IS"
DAEMONS = ("libvirtd", "virtqemud")
OBEYED_WITHIN_S = 15.0
"""A libvirt daemon looks for hooks anew soon after it was told to reload, not at once."""
PROBE_PAUSE_S = 0.2
PROBE_SIDE = "probe"


class HookError(AgentError):
    """The hook cannot be put into place, or libvirt does not obey it."""

    code = "hook"


def why_impossible(config: Config) -> str:
    """Why there can be no hook on this host, as a sentence; empty where there can."""
    uri = urlsplit(config.libvirt.uri)
    if uri.path == "/embed":
        return (
            f"libvirt is embedded in the agent ({config.libvirt.uri}), which takes hooks from a folder of the whole "
            "machine: fences on this host are autostart and image locks alone"
        )
    if uri.path == "/session":
        return (
            f"{config.libvirt.uri} is one user's libvirt, while hooks are the whole machine's: fences on this host are "
            "autostart and image locks alone"
        )
    if not config.libvirt.hook_dir.is_dir() and not config.libvirt.hook_dir.parent.parent.is_dir():
        return (
            f"there is no folder {config.libvirt.hook_dir.parent.parent}: install libvirt's daemon "
            "(libvirt-daemon-system), or set libvirt.hook_dir"
        )
    return ""


def hook_text(config: Config) -> str:
    """The executable as it is to be."""
    source = Path(fence_hook.__file__).read_text(encoding="utf-8")
    return f"#!{INTERPRETER}\n" + source.replace(
        'STATE_DIR = ""', f"STATE_DIR = {str(config.state_dir.absolute())!r}", 1
    )


def hook_path(config: Config) -> Path:
    """Where it lies."""
    return config.libvirt.hook_dir / HOOK_NAME


def hook_state(config: Config) -> HookState:
    """What lies there; whether libvirt obeys it is told by `prove` alone."""
    if why_impossible(config):
        return HookState.IMPOSSIBLE
    path = hook_path(config)
    try:
        same = path.read_text(encoding="utf-8") == hook_text(config)
    except FileNotFoundError:
        return HookState.MISSING
    except (OSError, ValueError):
        return HookState.OUTDATED
    return HookState.INSTALLED if same and os.access(path, os.X_OK) else HookState.OUTDATED


def install(config: Config) -> str:
    """Write the hook, let libvirt look for it, prove it; a sentence on how it was proven.

    Raises:
        HookError: there can be none, it cannot be written, or a fenced probe was started all the same.
        HypervisorError: libvirt cannot be asked.
    """
    why = why_impossible(config)
    if why:
        raise HookError(why)
    path = hook_path(config)
    # libvirt runs whatever lies in that folder and is executable: written under a name of its own folder's side.
    beside = path.parent.parent / f".{HOOK_NAME}.new"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        beside.write_text(hook_text(config), encoding="utf-8")
        beside.chmod(0o755)
        beside.replace(path)
    except OSError as error:
        raise HookError(f"the hook {path} cannot be written: {error.strerror}; do it as root") from error
    reload_libvirt(config)
    return prove(config, within_s=OBEYED_WITHIN_S)


def remove(config: Config) -> bool:
    """Take the hook away; False when there was none.

    Raises:
        HookError: it cannot be removed.
    """
    path = hook_path(config)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HookError(f"the hook {path} cannot be removed: {error.strerror}; do it as root") from error
    reload_libvirt(config)
    return True


def prove(config: Config, *, within_s: float = 0.0) -> str:
    """Let libvirt start a fenced probe: a transient domain without disks, which must be refused by the hook's words.

    Args:
        within_s: how long libvirt may take to see the hook.

    Raises:
        HookError: it was started, or refused for another reason.
        HypervisorError: libvirt cannot be asked.
    """
    uuid = str(uuids.uuid4())
    name = f"failback-fence-probe-{uuid[:8]}"
    deadline = time.monotonic() + within_s
    with _listed(config, name, uuid):
        while True:
            said = refusal_of_probe(config.libvirt.uri, name, uuid)
            if said is not None and f"the VM {name} must not start" in said:
                return f"libvirt refused to start the fenced probe {name}"
            if time.monotonic() >= deadline:
                break
            time.sleep(PROBE_PAUSE_S)
    if said is None:
        raise HookError(
            f"libvirt started the fenced probe {name} (ended again): it does not call {hook_path(config)}; restart its "
            "daemon (`systemctl restart libvirtd` or virtqemud; VMs go on), then `failback-agent fence install` again"
        )
    raise HookError(f"the probe {name} was refused, but not by the hook: {said.strip()}")


@contextlib.contextmanager
def _listed(config: Config, name: str, uuid: str) -> Iterator[None]:
    """The probe is on a list of its own meanwhile: the other one is the ledger's."""
    fence: dict[str, object] = {
        "vm_uuid": uuid,
        "vm_name": name,
        "pair": PROBE_SIDE,
        "run": PROBE_SIDE,
        "side": PROBE_SIDE,
        "condition": "",
        "images": [],
    }
    path = config.state_dir / PROBE_NAME
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_list(config.state_dir, list_text([fence]), name=PROBE_NAME)
    except OSError as error:
        raise HookError(f"the probe's list {path} cannot be written: {error.strerror}; do it as root") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def reload_libvirt(config: Config) -> None:
    """Tell the daemon to look for hooks anew (SIGHUP); it caches whether there are any. Its pid file names it, and its
    own name is compared: a stale number may be anybody's."""
    for daemon in DAEMONS:
        try:
            pid = int((_run_dir(config.libvirt.uri) / f"{daemon}.pid").read_text())
            if pid > 1 and Path(f"/proc/{pid}/comm").read_text().strip() == daemon:
                os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError):
            continue  # it does not run, and finds the hook when it starts


def _run_dir(uri: str) -> Path:
    sockets = parse_qs(urlsplit(uri).query).get("socket")
    return Path(sockets[0]).parent.parent if sockets else Path("/run")


def unlisted(config: Config) -> str:
    """What is wrong with the list that the hook reads, as a sentence; empty where nothing is."""
    path = config.state_dir / fence_hook.LISTS[0]
    try:
        listed = {fence["vm_uuid"] for fence in json.loads(path.read_text(encoding="utf-8"))["fences"]}
        ledger = json.loads((config.state_dir / fence_hook.LEDGER).read_text(encoding="utf-8"))["fences"]
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read: {error}"
    missing = sorted(fence["vm_uuid"] for fence in ledger if fence["vm_uuid"] not in listed)
    return f"{path} lacks the fenced {', '.join(missing)}" if missing else ""
