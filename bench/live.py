"""qcow2: a running VM's view over NBD beside rsync of the closed images, and a closed image beside a raw one."""

from __future__ import annotations

import os

from bench import pagecache, peers
from bench.benchmark import TARGET_SHARE, Settings, describe_image, make_image
from bench.farm import PairSpec, Shape, open_farm
from bench.measure import Result, Run, ratio_of_medians, with_ratios
from bench.placement import Image, as_qcow2, assert_same

PAIR = "bench"


def _qcow2(settings: Settings, default_gib: float, name: str = "source") -> tuple[Image, Image]:
    """The raw image and the same disk as qcow2."""
    raw = make_image(settings.folder / f"{name}.raw", settings.size_bytes(default_gib))
    return raw, as_qcow2(raw, settings.folder / f"{name}.qcow2")


def compare_live(settings: Settings) -> Result:
    """A pass from a running VM's qcow2 view onto a closed qcow2 original ÷ rsync of the closed images.

    The guest is idle; 3% of its blocks are changed in place under it before each round.
    """
    raw, source = _qcow2(settings, 8)
    raw.path.unlink()
    ours, theirs = (source.copy_to(settings.folder / f"{name}.qcow2") for name in ("ours", "rsync"))
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [PairSpec(PAIR, (ours,), (source,))], Shape(running=True)) as farm:
        for number in settings.count():
            changed = source.change(share=TARGET_SHARE, seed=number + 100)
            os.sync()
            pagecache.warm([source.path, ours.path])
            farm.forget_maps()
            passed = farm.run_pass(PAIR)
            # Each run leaves its own traces in the images' tables; rsync has to carry them too, which is little.
            pagecache.warm([source.path, theirs.path])
            rsync_s = peers.rsync_s(source.path, theirs.path)
            run: Run = {"ours_s": passed.seconds, "rsync_s": rsync_s, "changed_block_bytes": changed.block_bytes}
            if number:
                runs.append({**run, "rung": passed.rungs, "wire_bytes": passed.wire_bytes})
        assert_same(source, ours)
    return Result(
        ratio=ratio_of_medians(runs, "ours_s", "rsync_s"),
        runs=with_ratios(runs, "ours_s", "rsync_s"),
        page_cache="warm: both images were read just before",
        facts=describe_image(source),
    )


def qcow2_speed(settings: Settings) -> Result:
    """A pass from a closed qcow2 image onto another, 3% changed ÷ the same with raw images, in the same rounds."""
    raw, source = _qcow2(settings, 4)
    ours = source.copy_to(settings.folder / "ours.qcow2")
    raw_ours = raw.copy_to(settings.folder / "ours.raw")
    pairs = [PairSpec("closed", (ours,), (source,)), PairSpec("raw", (raw_ours,), (raw,))]
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", pairs) as farm:
        for number in settings.count():
            run: Run = {}
            for name, image, target in (("closed", source, ours), ("raw", raw, raw_ours)):
                image.change(share=TARGET_SHARE, seed=number + 100)
                os.sync()
                pagecache.warm([image.path, target.path])
                farm.forget_maps()
                run[f"{name}_s"] = farm.run_pass(name).seconds
            if number:
                runs.append(run)
        assert_same(source, ours)
        assert_same(raw, raw_ours)
    return Result(
        ratio=ratio_of_medians(runs, "closed_s", "raw_s"),
        runs=with_ratios(runs, "closed_s", "raw_s"),
        page_cache="warm: both images were read just before",
        facts=describe_image(raw),
    )
