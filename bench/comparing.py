"""Comparisons of raw images that are off: beside rsync, beside the read limit, warm, cold, and by share changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bench import pagecache, peers
from bench.benchmark import TARGET_SHARE, Settings, describe_image, make_image, warm_limit
from bench.farm import PairSpec, open_farm
from bench.measure import Result, Run, column, is_noisy, median_of, ratio_of_medians, with_ratios
from bench.placement import Image, assert_same, empty
from bench.readers import COLD_WAYS, best_way, open_readers

PAIR = "bench"
WARM = "warm: both images were read just before"


@dataclass(frozen=True, slots=True)
class RawPair:
    """A source image and the target that failback makes equal to it, equal at first."""

    source: Image
    ours: Image

    @property
    def spec(self) -> PairSpec:
        """As a pair of the farm."""
        return PairSpec(PAIR, (self.ours,), (self.source,))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Both files."""
        return self.source.path, self.ours.path


def raw_pair(settings: Settings, default_gib: float) -> RawPair:
    """Make the two images."""
    source = make_image(settings.folder / "source.raw", settings.size_bytes(default_gib))
    return RawPair(source, source.copy_to(settings.folder / "ours.raw"))


def compare_vs_rsync(settings: Settings) -> Result:
    """A pass over a raw image of which 3% of the blocks changed ÷ rsync of the same."""
    pair = raw_pair(settings, 8)
    theirs = pair.source.copy_to(settings.folder / "rsync.raw")
    way, limit_s = warm_limit(pair.paths)
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [pair.spec]) as farm:
        for number in settings.count():
            changed = pair.source.change(share=TARGET_SHARE, seed=number + 100)
            os.sync()
            limit = limit_s()
            farm.forget_maps()
            ours = farm.run_pass(PAIR)
            pagecache.warm([pair.source.path, theirs.path])
            rsync_s = peers.rsync_s(pair.source.path, theirs.path)
            run: Run = {"ours_s": ours.seconds, "rsync_s": rsync_s, "limit_s": limit}
            run |= {"changed_block_bytes": changed.block_bytes, "changed_page_bytes": changed.page_bytes}
            run |= {"rung": ours.rungs, "wire_bytes": ours.wire_bytes, "verified_bytes": ours.total("verified_bytes")}
            if number:
                runs.append(run)
    assert_same(pair.source, pair.ours)
    assert_same(pair.source, theirs)
    return Result(
        ratio=ratio_of_medians(runs, "ours_s", "rsync_s"),
        runs=with_ratios(runs, "ours_s", "rsync_s"),
        noisy=is_noisy(column(runs, "limit_s")),
        page_cache=WARM,
        facts={
            **describe_image(pair.source),
            "limit": str(way),
            "ours_to_limit": round(ratio_of_medians(runs, "ours_s", "limit_s"), 3),
        },
    )


def beside_peers(settings: Settings) -> Result:
    """The same beside every peer, each bringing a target of its own up to date ÷ the fastest of them.

    qemu-img and nbdcopy (qemu-nbd at both ends, unix sockets) copy in full, whatever changed.
    """
    pair = raw_pair(settings, 4)
    names = ("rsync", "qemu_img", "nbdcopy")
    targets = {name: pair.source.copy_to(settings.folder / f"{name}.raw") for name in names}
    runs: list[Run] = []
    sockets = [settings.folder / f"{end}.sock" for end in ("source", "target")]
    with (
        open_farm(settings.folder / "farm", [pair.spec]) as farm,
        peers.served_locally(pair.source.path, "raw", sockets[0], writable=False) as source_uri,
        peers.served_locally(targets["nbdcopy"].path, "raw", sockets[1], writable=True) as target_uri,
    ):
        for number in settings.count():
            pair.source.change(share=TARGET_SHARE, seed=number + 100)
            os.sync()
            pagecache.warm(pair.paths)
            farm.forget_maps()
            run: Run = {"ours_s": farm.run_pass(PAIR).seconds}
            run["rsync_s"] = peers.rsync_s(pair.source.path, targets["rsync"].path)
            run["qemu_img_s"] = peers.qemu_img_s(pair.source, targets["qemu_img"].path)
            run["nbdcopy_s"] = peers.nbdcopy_s(source_uri, target_uri, target_is_empty=False)
            if number:
                runs.append(run)
    for image in (pair.ours, *targets.values()):
        assert_same(pair.source, image)
    fastest = min(names, key=lambda name: median_of(runs, f"{name}_s"))
    return Result(
        ratio=ratio_of_medians(runs, "ours_s", f"{fastest}_s"),
        runs=with_ratios(runs, "ours_s", f"{fastest}_s"),
        page_cache="warm: the source was read just before, the targets by the round before",
        facts={**describe_image(pair.source), "fastest_peer": fastest},
    )


def identical_vs_limit(settings: Settings) -> Result:
    """Identical images, warm, both sides read ÷ two processes that only read them.

    Beside it, in the same rounds, the same with the target's digest map, where only the source is read.
    """
    pair = raw_pair(settings, 8)
    way, limit_s = warm_limit(pair.paths)
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [pair.spec]) as farm:
        for number in settings.count():
            farm.forget_maps()
            limit = limit_s()
            resident = pagecache.state(pair.paths)
            ours = farm.run_pass(PAIR)
            run: Run = {"ours_s": ours.seconds, "limit_s": limit, "rung": ours.rungs, "resident_before": resident}
            limit_s()
            mapped = farm.run_pass(PAIR)
            run |= {"mapped_s": mapped.seconds, "mapped_rung": mapped.rungs}
            if number:
                runs.append({**run, "written_bytes": ours.total("written_bytes")})
    return Result(
        ratio=ratio_of_medians(runs, "ours_s", "limit_s"),
        runs=with_ratios(runs, "ours_s", "limit_s"),
        noisy=is_noisy(column(runs, "limit_s")),
        page_cache=WARM,
        facts={
            **describe_image(pair.source),
            "limit": str(way),
            "with_map": round(ratio_of_medians(runs, "mapped_s", "limit_s"), 3),
        },
    )


def cold_vs_read(settings: Settings) -> Result:
    """Images with 3% of the blocks changed, neither in the page cache ÷ two processes that only read them, cold too."""
    pair = raw_pair(settings, 8)
    way = best_way(pair.paths, COLD_WAYS, cold=True)
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [pair.spec]) as farm, open_readers(pair.paths, way) as readers:
        for number in settings.count():
            pair.source.change(share=TARGET_SHARE, seed=number + 100)
            pagecache.cool(pair.paths)
            limit = readers.read_s()
            pagecache.cool(pair.paths)
            farm.forget_maps()
            before = pagecache.state(pair.paths)
            ours = farm.run_pass(PAIR)
            run: Run = {"ours_s": ours.seconds, "limit_s": limit, "resident_before": before}
            if number:
                runs.append({**run, "resident_after": pagecache.state(pair.paths)})
    assert_same(pair.source, pair.ours)
    return Result(
        ratio=ratio_of_medians(runs, "ours_s", "limit_s"),
        runs=with_ratios(runs, "ours_s", "limit_s"),
        noisy=is_noisy(column(runs, "limit_s")),
        page_cache="cold: both files were written back and taken out of it (posix_fadvise) before each measurement",
        facts={**describe_image(pair.source), "limit": str(way)},
    )


SHARES = (0.0, 0.01, 0.03, 0.1, 0.5, 1.0)


def throughput(settings: Settings) -> Result:
    """GB of disk per second at 0, 1, 3, 10, 50 and 100% of the blocks changed, and in a full transfer to an empty disk.

    The measure is the median at 3%.
    """
    pair = raw_pair(settings, 4)
    size_gb = pair.source.plan.size_bytes / 1e9
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [pair.spec]) as farm:
        for number in settings.count():
            run: Run = {}
            for share in SHARES:
                pair.source.change(share=share, seed=1000 * number + round(share * 100))
                os.sync()
                pagecache.warm(pair.paths)
                farm.forget_maps()
                run[_named(share)] = round(size_gb / farm.run_pass(PAIR).seconds, 4)
            empty(pair.ours.path)
            run["empty_target_gb_per_s"] = round(size_gb / farm.run_pass(PAIR).seconds, 4)
            if number:
                runs.append(run)
    assert_same(pair.source, pair.ours)
    medians = {f"{share:g}": round(median_of(runs, _named(share)), 3) for share in SHARES}
    return Result(
        ratio=median_of(runs, _named(TARGET_SHARE)),
        runs=runs,
        unit="GB/s of disk at 3% changed",
        page_cache=WARM,
        facts={**describe_image(pair.source), "gb_per_s_by_share": medians},
    )


def _named(share: float) -> str:
    return f"changed_{round(share * 100)}_percent_gb_per_s"
