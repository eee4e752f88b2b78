"""``full-vs-nbdcopy``: everything to an empty disk over TLS, on storage that costs nothing; and what proof costs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench import pagecache
from bench.benchmark import Settings, describe_image, empty_like, empty_pass, make_image
from bench.farm import PairSpec, Shape, open_farm
from bench.measure import Result, Run, ratio_of_medians, with_ratios
from bench.peers import NbdTls, nbdcopy_s, served
from bench.placement import Image, assert_same, empty
from bench.ports import free_ports
from bench.variants import program

PAIR = "bench"
TMPFS = Path("/dev/shm")


def full_vs_nbdcopy(settings: Settings) -> Result:
    """Full transfer to an empty target over TLS ÷ nbdcopy --flush between two qemu-nbd over TLS with certificates.

    Targets are on tmpfs. Our read-back is left out (an agent that flushes only) and measured beside it, in the same
    rounds, by the agent as it is: ``verify_cost`` is its time ÷ the other's.
    """
    memory = Path(tempfile.mkdtemp(prefix="bench-", dir=TMPFS))
    try:
        source = make_image(settings.folder / "source.raw", settings.size_bytes(4))
        targets = {name: empty_like(source, memory / f"{name}.raw") for name in ("unproven", "proven", "nbdcopy")}
        return _measure(settings, source, targets)
    finally:
        shutil.rmtree(memory)


def _measure(settings: Settings, source: Image, targets: Mapping[str, Image]) -> Result:
    runs: list[Run] = []
    tls = NbdTls.make(settings.folder / "tls")
    sources = {"proven": source, "unproven": source.copy_to(settings.folder / "other-source.raw")}
    specs = {name: [PairSpec(PAIR, (targets[name],), (image,))] for name, image in sources.items()}
    source_port, target_port = free_ports(2)
    unproven = Shape(agents={"prod": program("unproven")})
    with (
        open_farm(settings.folder / "farm-proven", specs["proven"]) as proven_farm,
        open_farm(settings.folder / "farm-unproven", specs["unproven"], unproven) as unproven_farm,
        served(source.path, "raw", port=source_port, writable=False, tls=tls) as source_uri,
        served(targets["nbdcopy"].path, "raw", port=target_port, writable=True, tls=tls) as target_uri,
    ):
        for number in settings.count():
            pagecache.warm(image.path for image in sources.values())
            run: Run = {"unproven_s": empty_pass(unproven_farm, PAIR, targets["unproven"])}
            empty(targets["nbdcopy"].path)
            run["nbdcopy_s"] = nbdcopy_s(source_uri, target_uri, target_is_empty=True)
            run["proven_s"] = empty_pass(proven_farm, PAIR, targets["proven"])
            if number:
                runs.append(run)
        for image in targets.values():
            assert_same(source, image)
    return Result(
        ratio=ratio_of_medians(runs, "unproven_s", "nbdcopy_s"),
        runs=with_ratios(runs, "unproven_s", "nbdcopy_s"),
        page_cache="warm: the sources were read just before; the targets are on tmpfs",
        facts={
            **describe_image(source),
            "verify_cost": round(ratio_of_medians(runs, "proven_s", "unproven_s"), 3),
            "nbdcopy": "--flush --destination-is-zero, 4 connections at each end",
        },
    )
