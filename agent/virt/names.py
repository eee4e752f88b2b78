"""How failback names the files it puts beside a VM's disks; by these names it knows its own again after any crash."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.errors import HypervisorError

SNAPSHOT_PREFIX = "failback-"
SNAPSHOT_MARK = "made by failback"
"""Our snapshots and checkpoints have names that begin with the one and descriptions that contain the other."""

TRACK_MARK = ".failback-track-"
"""In the name of every overlay that records what a running guest writes."""

SOCKET_PATH_LIMIT_BYTES = 107  # sun_path holds 108 with its closing NUL: unix(7)
FILE_NAME_LIMIT_BYTES = 255

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BITMAP = re.compile(re.escape(SNAPSHOT_PREFIX) + r"[0-9a-f]{12}")  # agent.sources.tag_of
_SNAPSHOT = re.compile(re.escape(SNAPSHOT_PREFIX) + r"[A-Za-z0-9._-]{1,118}")  # a pair's name and a run's, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """An image as a disk's source: where it is, how it is to be read, whether it is a block device."""

    path: Path
    format: str
    block: bool = False


def is_ours(snapshot: str, description: str) -> bool:
    """Whether failback made that snapshot or checkpoint: a person may well choose one of the two signs, hardly both."""
    return snapshot.startswith(SNAPSHOT_PREFIX) and SNAPSHOT_MARK in description


def is_our_bitmap(name: str) -> bool:
    """Whether a dirty bitmap has the name that one of our views gives it."""
    return _BITMAP.fullmatch(name) is not None


def marked(description: str) -> str:
    """The description with our mark in it."""
    return description if SNAPSHOT_MARK in description else f"{description} ({SNAPSHOT_MARK})"


def check_snapshot(snapshot: str) -> None:
    """Refuse a snapshot name that would not be known as ours later."""
    if not _SNAPSHOT.fullmatch(snapshot):
        raise HypervisorError(
            f"{snapshot!r} cannot name a snapshot of ours: {SNAPSHOT_PREFIX}, then letters, digits, dots and dashes, "
            "at most 127 in all.",
            snapshot=snapshot,
        )


def check_tag(tag: str) -> None:
    """Refuse a tag that cannot be part of a file name."""
    if not _TAG.fullmatch(tag):
        raise HypervisorError(
            f"{tag!r} cannot name a view: letters, digits, dots and dashes, at most 64 in all.", tag=tag
        )


def socket_name(tag: str) -> str:
    """The name of a view's socket."""
    return f"failback-{tag}.sock"


def scratch_name(uuid: str, target: str, tag: str) -> str:
    """The name of a view's scratch file; the same whatever image the disk points at by now."""
    return f"failback-{uuid}-{target}-{tag}.scratch"


def overlay_paths(bases: Mapping[str, ImageRef], snapshot: str, scratch_dir: Path) -> dict[str, Path]:
    """Where the overlays of `snapshot` go, by target: ``STEM.SNAPSHOT.qcow2`` beside the base.

    The name of an earlier snapshot of ours in the stem is replaced, so that names do not grow with every failback.
    Bases that would share an overlay's name (``a.raw`` and ``a.qcow2``) keep their whole names and targets in it.
    """

    def path(base: ImageRef, stem: str) -> Path:
        folder = scratch_dir if base.block else base.path.parent
        return folder / f"{stem}.{snapshot}.qcow2"

    by_stem = {t: path(base, base.path.stem.split(f".{SNAPSHOT_PREFIX}")[0]) for t, base in bases.items()}
    uses = Counter(by_stem.values())
    return {
        target: by_stem[target] if uses[by_stem[target]] == 1 else path(base, f"{base.path.name}.{target}")
        for target, base in bases.items()
    }


def track_overlay_path(base: ImageRef, uuid: str, target: str, tag: str, scratch_dir: Path) -> Path:
    """Where the overlay goes that records what is written to a disk from the view of that tag on.

    Beside the disk, where QEMU may write (for a block device in `scratch_dir`); the name says whose it is. `base`: the
    disk's own image, not an older overlay, so that names do not grow with every view.
    """
    folder = scratch_dir if base.block else base.path.parent
    return folder / f"{base.path.stem}{TRACK_MARK}{uuid}-{target}-{tag.removeprefix(SNAPSHOT_PREFIX)}.qcow2"
