"""``memory``: what an agent holds while it works on disks far larger than any memory."""

from __future__ import annotations

import time
from pathlib import Path

from bench import images
from bench.benchmark import GIB, SEED, Settings, empty_like
from bench.farm import Farm, PairSpec, Shape, open_farm, say
from bench.measure import Result, Run
from bench.placement import Image, assert_same, stretched
from bench.resident import sampled
from bench.variants import PREFIX, program

SPARSE_BYTES = 1 << 40
SPARSE_DATA_GIB = 4.0
MIB = 1 << 20


def memory(settings: Settings) -> Result:
    """Peak of private resident memory of either agent with its children, MiB, over a full transfer of a 1 TiB sparse
    disk with 4 GiB of data and a comparison of a 1 TiB dense disk that is made up as it is read."""
    plan = images.layout(settings.size_bytes(SPARSE_DATA_GIB), seed=SEED, free_share=0.0)
    say("making the sparse disk")
    sparse = stretched(settings.folder / "sparse.raw", SPARSE_BYTES, plan)
    target = empty_like(sparse, settings.folder / "sparse-ours.raw")
    with target.path.open("r+b") as file:
        file.truncate(SPARSE_BYTES)
    dense_bytes = int(settings.dense_gib * GIB) >> 24 << 24
    dense = [_hollow(settings.folder / f"{PREFIX}-{end}.raw", dense_bytes, sparse) for end in ("source", "target")]
    specs = [PairSpec("sparse", (target,), (sparse,)), PairSpec("dense", (dense[1],), (dense[0],))]
    agents = dict.fromkeys(("prod", "dr"), program("generated"))
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", specs, Shape(agents=agents)) as farm:
        for name in ("sparse", "dense"):
            say(f"passing over the {name} disk")
            runs.append(_watched(farm, name))
    assert_same(sparse, target)
    peaks = [float(str(run[f"{side}_mib"])) for run in runs for side in ("source", "target")]
    return Result(
        ratio=max(peaks),
        runs=runs,
        unit="MiB",
        page_cache="does not matter: private memory is counted, not the page cache",
        facts={"sparse_bytes": SPARSE_BYTES, "sparse_data_bytes": plan.data_bytes, "dense_bytes": dense_bytes},
    )


def _hollow(path: Path, size_bytes: int, like: Image) -> Image:
    """A file of the dense disk's size with nothing in it: libvirt, locks and inspection want to see one."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return Image(path, "raw", like.plan, like.extents)


def _watched(farm: Farm, pair: str) -> Run:
    started = time.monotonic()
    with sampled({"source": farm.source.pid, "target": farm.target.pid}) as sampler:
        passed = farm.run_pass(pair)
    return {
        "disk": pair,
        "source_mib": round(sampler.peaks["source"] / MIB, 1),
        "target_mib": round(sampler.peaks["target"] / MIB, 1),
        "samples": sampler.samples,
        "pass_s": round(passed.seconds, 2),
        "watched_s": round(time.monotonic() - started, 2),
        "compared_bytes": passed.total("compared_bytes"),
        "written_bytes": passed.total("written_bytes"),
    }
