"""libvirt's qemu hook: refuses to start a fenced VM, also where no agent runs.

`failback-agent fence install` copies this file into libvirt's folder of hooks, with the state folder written into it;
it runs with the standard library alone. It never calls libvirt, which would wait for itself, and says yes to every
operation but those that begin a start: a no at ``reconnect`` would kill a running VM.
"""

import sys

STATE_DIR = ""
REFUSES = ("prepare", "restore", "migrate")
LISTS = ("fenced.json", "fence-probe.json")
LEDGER = "ledger.json"


def judge(state_dir: str, name: str, xml: bytes) -> "tuple[str, str]":
    """Why the domain must not start, and what to warn of in the journal; each may be empty."""
    import json

    uuid, disks = _domain(xml)
    trouble = ""
    for file in LISTS:
        path = f"{state_dir}/{file}"
        try:
            with open(path, "rb") as opened:
                fences = json.loads(opened.read())["fences"]
            for fence in fences:
                if _is_meant(fence, name, uuid, disks):
                    return sentence(fence, name), ""
        except FileNotFoundError as error:
            if file == LISTS[0]:
                trouble = str(error)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            trouble = f"{path}: {error}"
    if not trouble:
        return "", ""
    return _without_list(state_dir, name, uuid, disks, trouble)


def _without_list(
    state_dir: str, name: str, uuid: str, disks: "list[tuple[str, bool]]", trouble: str
) -> "tuple[str, str]":
    """The list cannot be read: a VM that its remains, or the agent's ledger, speak of as fenced does not start."""
    import contextlib
    import json

    # Where its definition says nothing, its name has to do: better one start refused too many than one too few.
    marks = [mark.encode() for mark in (uuid or json.dumps(name), *(path for path, _ in disks))]
    cure = "restart failback-agent, which writes it anew"
    for file in (LISTS[0], LEDGER):
        try:
            with open(f"{state_dir}/{file}", "rb") as opened:
                content = opened.read()
        except OSError:
            continue
        if file == LEDGER:
            # Of a ledger that is damaged too, what is left is searched.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                content = json.dumps(json.loads(content)["fences"]).encode()
        if any(mark in content for mark in marks):
            return (
                f"failback: the VM {name} is not started, for the list of fenced VMs cannot be read ({trouble}) and "
                f"{state_dir}/{file} names this VM: {cure}; if it must start, "
                f"`failback-agent fence lift {name} --reason TEXT` on this host"
            ), ""
    return "", (
        f"the list of fenced VMs cannot be read ({trouble}); nothing else says that the VM {name} is fenced, so it "
        f"starts: {cure}"
    )


def sentence(fence: "dict[str, object]", name: str) -> str:
    """What the administrator reads in the error of ``virsh start``."""
    torn = ", its disks are torn (written in part, not verified)" if fence.get("condition") == "torn" else ""
    pair = fence["pair"]
    return (
        f"failback: the VM {name} must not start: it is fenced for the pair {pair} as its {fence['side']} by the run "
        f"{fence['run']}{torn}; `failback status {pair}` on the coordinator shows what holds it and how to end that "
        f"(resume, commit, undo, cancel); if no run will, `failback-agent fence lift {fence['vm_name'] or name} "
        "--reason TEXT` on this host"
    )


def _is_meant(fence: "dict[str, object]", name: str, uuid: str, disks: "list[tuple[str, bool]]") -> bool:
    if uuid:
        if fence["vm_uuid"] == uuid:
            return True
    elif fence["vm_name"] == name:
        return True  # no definition to read it from
    images = fence["images"]
    if not isinstance(images, list):
        raise TypeError("images of a fence are no list")
    for image in images:
        exclusive = image["kind"] == "exclusive"
        # A frozen image may be read by others, as a base; whoever has it on top would write to it.
        if any(_same(image["path"], path) for path, on_top in disks if on_top or exclusive):
            return True
    return False


def _same(ours: str, theirs: str) -> bool:
    import os

    if os.path.realpath(ours) == os.path.realpath(theirs):
        return True
    try:
        a, b = os.stat(ours), os.stat(theirs)  # noqa: PTH116 - pathlib takes as long to load as all the rest
    except OSError:
        return False
    if a.st_rdev or b.st_rdev:
        return a.st_rdev == b.st_rdev
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _domain(xml: bytes) -> "tuple[str, list[tuple[str, bool]]]":
    """UUID and disk images of the domain; each image with whether it is a disk's top one. Empty where it is no XML."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return "", []
    disks = []
    for disk in root.iterfind("./devices/disk"):
        top = disk.find("source")
        for source in disk.iter("source"):
            path = source.get("file") or source.get("dev")
            if path:
                disks.append((path, source is top))
    return (root.findtext("uuid") or "").strip().lower(), disks


def main(arguments: "list[str]") -> int:
    """Called by libvirt with domain name, operation, sub-operation and one more, the domain's XML on standard input."""
    if len(arguments) < 3 or arguments[2] not in REFUSES:
        return 0
    name = arguments[1]
    try:
        refusal, warning = judge(STATE_DIR, name, sys.stdin.buffer.read())
    except Exception as error:  # noqa: BLE001 - a mistake of ours keeps none but fenced VMs from starting
        refusal, warning = _without_list(STATE_DIR, name, "", [], f"the hook failed: {error!r}")
    if refusal:
        sys.stderr.write(refusal + "\n")
        return 1
    if warning:
        import syslog

        syslog.openlog("failback-fence", 0, syslog.LOG_DAEMON)
        syslog.syslog(syslog.LOG_ERR, warning)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
