"""Disks of other shapes: two at once, and sparse ones of any size."""

from __future__ import annotations

import os

from bench import images, pagecache
from bench.benchmark import GIB, SEED, TARGET_SHARE, Settings, describe_image, make_image
from bench.farm import PairSpec, open_farm
from bench.images import UNIT_BYTES
from bench.measure import Result, Run, ratio_of_medians, with_ratios
from bench.placement import Image, assert_same, stretched

SPARSE_BYTES = 8 << 40
SMALL_BYTES = 2 << 30
SPARSE_DATA_GIB = 1.0


def two_disks(settings: Settings) -> Result:
    """A VM with two disks of half the size ÷ one with a single disk of the whole, 3% changed, warm."""
    whole = settings.size_bytes(4)
    half = max(1, whole // 2 // UNIT_BYTES) * UNIT_BYTES
    one = _with_copy(settings, make_image(settings.folder / "one.raw", 2 * half))
    halves = [_with_copy(settings, make_image(settings.folder / f"half{n}.raw", half)) for n in range(2)]
    pairs = {"one": [one], "two": halves}
    specs = [
        PairSpec(name, tuple(target for _, target in disks), tuple(source for source, _ in disks))
        for name, disks in pairs.items()
    ]
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", specs) as farm:
        for number in settings.count():
            run: Run = {}
            for name, disks in pairs.items():
                for place, (source, _) in enumerate(disks):
                    source.change(share=TARGET_SHARE, seed=1000 * number + place)
                os.sync()
                pagecache.warm(image.path for pair in disks for image in pair)
                run[f"{name}_s"] = farm.run_pass(name).seconds
            if number:
                runs.append(run)
    for source, target in (one, *halves):
        assert_same(source, target)
    return Result(
        ratio=ratio_of_medians(runs, "two_s", "one_s"),
        runs=with_ratios(runs, "two_s", "one_s"),
        page_cache="warm: all images of a pair were read just before",
        facts=describe_image(one[0]),
    )


def sparse(settings: Settings) -> Result:
    """A sparse disk of 8 TiB with 1 GiB of data ÷ one of 2 GiB with the same data, 3% of that changed, warm."""
    plan = images.layout(settings.size_bytes(SPARSE_DATA_GIB), seed=SEED, free_share=0.0)
    pairs: dict[str, tuple[Image, Image]] = {}
    for name, size in (("huge", SPARSE_BYTES), ("small", max(SMALL_BYTES, 2 * plan.size_bytes))):
        source = stretched(settings.folder / f"{name}.raw", size, plan)
        pairs[name] = _with_copy(settings, source)
    runs: list[Run] = []
    specs = [PairSpec(name, (target,), (source,)) for name, (source, target) in pairs.items()]
    with open_farm(settings.folder / "farm", specs) as farm:
        for number in settings.count():
            run: Run = {}
            for name, (source, target) in pairs.items():
                source.change(share=TARGET_SHARE, seed=number + 100)
                os.sync()
                pagecache.warm([source.path, target.path])
                run[f"{name}_s"] = farm.run_pass(name).seconds
            if number:
                runs.append(run)
    for source, target in pairs.values():
        assert_same(source, target)
    return Result(
        ratio=ratio_of_medians(runs, "huge_s", "small_s"),
        runs=with_ratios(runs, "huge_s", "small_s"),
        page_cache="warm: both images were read just before",
        facts={"huge_bytes": SPARSE_BYTES, "small_bytes": SMALL_BYTES, "data_gib": plan.data_bytes / GIB},
    )


def _with_copy(settings: Settings, source: Image) -> tuple[Image, Image]:
    return source, source.copy_to(settings.folder / f"{source.path.stem}-ours.raw")
