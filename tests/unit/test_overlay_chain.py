"""What a chain with live overlays tells: what is merged into what, and since when writes are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent.overlay_chain import groups, known_since, stamp_of
from agent.overlay_record import OverlayRecord
from agent.virt.seam import Image


def image(path: Path) -> Image:
    image_format = "raw" if path.suffix == ".raw" else "qcow2"
    return Image(path=path, format=image_format, identity=path.name, virtual_size_bytes=1 << 20)


def record(overlay: Path, base: Path) -> OverlayRecord:
    return OverlayRecord(
        vm_uuid="u",
        pair="web",
        target="vda",
        view=overlay.stem,
        overlay=overlay,
        base=base,
        base_format="raw",
        definition="",
        answered=True,
        base_stamp=stamp_of(base),
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(bytes(4096))
    return path


# A chain from the top down, what is kept, and what is merged: each group, and what it goes into.
@pytest.mark.parametrize(
    ("chain", "keep", "merged"),
    [
        (["v1"], [], [(["v1"], "base")]),
        (["v1"], ["v1"], []),
        (["v2", "v1"], ["v2"], [(["v1"], "base")]),
        (["v2", "v1"], [], [(["v2", "v1"], "base")]),
        (["v3", "v2", "v1"], ["v3", "v1"], [(["v2"], "v1")]),
        (["v4", "v3", "v2", "v1"], ["v3"], [(["v2", "v1"], "base"), (["v4"], "v3")]),
        (["foreign", "v1"], [], [(["v1"], "base")]),
        (["v2", "foreign", "v1"], [], [(["v1"], "base")]),
        (["v2", "foreign"], [], []),
        ([], [], []),
    ],
)
def test_overlays_are_merged_into_what_is_ours_alone(
    base: Path, chain: list[str], keep: list[str], merged: list[tuple[list[str], str]]
) -> None:
    paths = [base.with_name(f"{name}.qcow2") for name in chain]
    records = {path: record(path, base) for path in paths if path.stem != "foreign"}
    found = groups([*map(image, paths), image(base)], records, keep)
    assert [([member.path.stem for member in group], into.path.stem) for group, into in found] == merged


def test_writes_are_known_since_the_view_whose_overlay_lies_in_the_chain(base: Path) -> None:
    second, first = base.with_name("v2.qcow2"), base.with_name("v1.qcow2")
    chain, records = [image(second), image(first), image(base)], [record(first, base), record(second, base)]
    assert (known_since("vda", chain, records, "v1").since, known_since("vda", chain, records, "v1").layers) == (
        "v1",
        2,
    )
    assert (known_since("vda", chain, records, "v2").since, known_since("vda", chain, records, "v2").layers) == (
        "v2",
        1,
    )
    nothing = known_since("vda", chain, records, None)
    assert (nothing.since, nothing.layers, nothing.why_not, nothing.image) == (None, 0, "", second)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"answered": False}, "never opened"),
        ({"base_stamp": ""}, "replaced or written"),
        ({"base_stamp": "file 1:2 3 4"}, "replaced or written"),
        ({"base": Path("/elsewhere.raw")}, "own image is"),
        ({"view": "v9"}, "no overlay of this disk"),
    ],
)
def test_what_is_not_proven_is_not_known(base: Path, changed: dict[str, object], why: str) -> None:
    overlay = base.with_name("v1.qcow2")
    known = replace(record(overlay, base), **changed)  # type: ignore[arg-type]
    found = known_since("vda", [image(overlay), image(base)], [known], "v1")
    assert (found.since, found.layers) == (None, 0)
    assert why in found.why_not


@pytest.mark.parametrize("damage", ["dirty", "corrupt", "external_data"])
def test_damaged_overlay_proves_nothing(base: Path, damage: str) -> None:
    overlay = base.with_name("v1.qcow2")
    damaged = replace(image(overlay), **{damage: True})  # type: ignore[arg-type]
    found = known_since("vda", [damaged, image(base)], [record(overlay, base)], "v1")
    assert (found.since, "damaged" in found.why_not) == (None, True)


def test_stamp_changes_with_every_write_and_replacement(base: Path) -> None:
    before = stamp_of(base)
    assert stamp_of(base) == before
    content = base.read_bytes()
    base.rename(base.with_suffix(".old"))
    assert stamp_of(base) == ""
    base.write_bytes(content)
    assert stamp_of(base) not in ("", before)
