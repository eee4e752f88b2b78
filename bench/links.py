"""Passes over a link of a known speed: bytes on the wire, and how much of the link is used, near and far."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import zstandard

from bench import pagecache
from bench.benchmark import (
    TARGET_SHARE,
    Settings,
    describe_image,
    empty_like,
    empty_pass,
    make_image,
    random_image,
    refill,
)
from bench.farm import BULK_PORT, Farm, PairSpec, Shape, open_farm
from bench.images import PAGE_BYTES
from bench.measure import Result, Run, column, is_noisy, median_of, ratio_of_medians, with_ratios
from bench.network import GIGABIT, Link, open_link
from bench.placement import Image, assert_same
from bench.stream import PORT, running, send_s

PAIR = "bench"
ZSTD_LEVEL = 3
ONE_WAY_MS = 50
PROXY_PORT, STREAM_PROXY_PORT = 9891, 9892
PROXY_MUST_REACH = 0.97


def changed_pages_zstd_bytes(source: Image, target: Image) -> tuple[int, int]:
    """Size of the 4 KiB pages in which the source differs from the target, and of those joined in one zstd -3 frame.

    A page that the source holds as zero counts too: whoever sends pages has to send it.
    """
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    plain = packed = 0
    with source.path.open("rb") as a, target.path.open("rb") as b:
        while (ours := a.read(16 << 20)) and (theirs := b.read(16 << 20)):
            if ours == theirs:
                continue
            pages = np.frombuffer(ours, dtype=np.uint8).reshape(-1, PAGE_BYTES)
            differ = (pages != np.frombuffer(theirs, dtype=np.uint8).reshape(-1, PAGE_BYTES)).any(axis=1)
            chosen = pages[differ]
            plain += chosen.nbytes
            packed += len(compressor.compress(chosen.tobytes()))
    return plain, packed + len(compressor.flush())


def limit_options(farm: Farm) -> tuple[str, ...]:
    """``--limit-network 1Gbit`` if this version of `failback start` has it.

    Raises:
        SystemExit: it has not, and the measure would be another one.
    """
    if "--limit-network" not in farm.coordinator.must("start", "--help").output:
        raise SystemExit("this version of `failback start` has no --limit-network: wire-vs-zstd cannot be measured")
    return ("--limit-network", "1Gbit")


def wire_vs_zstd(settings: Settings) -> Result:
    """Bytes at the network card, both ways, of a pass limited to 1 Gbit/s ÷ zstd -3 of the changed 4 KiB pages."""
    source = make_image(settings.folder / "source.raw", settings.size_bytes(8))
    ours = source.copy_to(settings.folder / "ours.raw")
    runs: list[Run] = []
    with (
        open_link(None) as link,
        open_farm(settings.folder / "farm", [PairSpec(PAIR, (ours,), (source,))], Shape(link=link)) as farm,
    ):
        options = limit_options(farm)
        for number in settings.count():
            source.change(share=TARGET_SHARE, seed=number + 100)
            os.sync()
            plain, packed = changed_pages_zstd_bytes(source, ours)
            before = link.source.link_bytes()
            passed = farm.run_pass(PAIR, *options)
            wire = link.source.link_bytes() - before
            run: Run = {"wire_bytes": wire, "zstd_bytes": packed, "changed_page_bytes": plain}
            if number:
                runs.append({**run, "reported_wire_bytes": passed.wire_bytes, "ours_s": passed.seconds})
    assert_same(source, ours)
    return Result(
        ratio=ratio_of_medians(runs, "wire_bytes", "zstd_bytes"),
        runs=with_ratios(runs, "wire_bytes", "zstd_bytes"),
        page_cache="does not matter: bytes are counted (warm)",
        facts={
            **describe_image(source),
            "counted": "eth0 of the source's namespace, sent and received, headers included; virtual cards hand over "
            "segments of up to 64 KiB, so headers weigh less than on Ethernet",
        },
    )


def link_use(settings: Settings) -> Result:
    """Incompressible data to an empty target over 1 Gbit/s: our bytes of disk per second ÷ those of a plain stream."""
    source = random_image(settings.folder / "source.raw", settings.size_bytes(2))
    target = empty_like(source, settings.folder / "ours.raw")
    size = source.plan.size_bytes
    runs: list[Run] = []
    with (
        open_link(GIGABIT) as link,
        running(["bench.stream", "sink", link.target.address, str(PORT)], link.target.inside()),
        open_farm(settings.folder / "farm", [PairSpec(PAIR, (target,), (source,))], Shape(link=link)) as farm,
    ):
        for number in settings.count():
            pagecache.warm([source.path])
            plain_s = send_s(size // 4, link.target.address, PORT, link.source.inside())
            seconds = empty_pass(farm, PAIR, target)
            if number:
                runs.append({"ours_mb_per_s": size / seconds / 1e6, "plain_mb_per_s": size / 4 / plain_s / 1e6})
    assert_same(source, target)
    return _use(runs, source, {"link": "1 Gbit/s, tc tbf both ways"})


def wan_use(settings: Settings) -> Result:
    """The same over a round trip of 100 ms, made by a user-space proxy, which the plain stream goes through as well."""
    source = random_image(settings.folder / "source.raw", settings.size_bytes(1))
    target = empty_like(source, settings.folder / "ours.raw")
    size = source.plan.size_bytes
    runs: list[Run] = []
    shape_of = PairSpec(PAIR, (target,), (source,))
    with _far_away() as link:
        shape = Shape(link=link, bulk_endpoint=("127.0.0.1", PROXY_PORT))
        with open_farm(settings.folder / "farm", [shape_of], shape) as farm:
            for number in settings.count():
                refill(source, seed=number)
                pagecache.warm([source.path])
                direct_s = send_s(size // 4, link.target.address, PORT, link.source.inside())
                plain_s = send_s(size, "127.0.0.1", STREAM_PROXY_PORT, link.source.inside())
                seconds = empty_pass(farm, PAIR, target)
                run: Run = {"ours_mb_per_s": size / seconds / 1e6, "plain_mb_per_s": size / plain_s / 1e6}
                # One round trip for the connection and one for the last byte and its answer are not the proxy's rate.
                lasted_s = plain_s - 4 * ONE_WAY_MS / 1000
                run["proxy_alone"] = round(size / lasted_s / (size / 4 / direct_s), 4)
                if number:
                    runs.append(run)
    assert_same(source, target)
    alone = median_of(runs, "proxy_alone")
    facts = {"link": "1 Gbit/s, tc tbf both ways, 100 ms round trip by a user-space proxy"}
    return _use(runs, source, {**facts, "proxy_alone": alone, "proxy_good_enough": alone >= PROXY_MUST_REACH})


@contextlib.contextmanager
def _far_away() -> Iterator[Link]:
    """A gigabit link, a sink for plain streams, and delaying proxies at the source in front of the sink and of the
    target agent's bulk port."""
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(open_link(GIGABIT))
        address, inside = link.target.address, link.source.inside()
        stack.enter_context(running(["bench.stream", "sink", address, str(PORT)], link.target.inside()))
        for port, behind in ((PROXY_PORT, BULK_PORT), (STREAM_PROXY_PORT, PORT)):
            words = ["bench.delay_proxy", str(port), address, str(behind), str(ONE_WAY_MS)]
            stack.enter_context(running(words, inside))
        yield link


def _use(runs: list[Run], source: Image, facts: dict[str, object]) -> Result:
    return Result(
        ratio=ratio_of_medians(runs, "ours_mb_per_s", "plain_mb_per_s"),
        runs=with_ratios(runs, "ours_mb_per_s", "plain_mb_per_s"),
        noisy=is_noisy(column(runs, "plain_mb_per_s")),
        page_cache="warm: the source was read just before",
        facts={**describe_image(source), **facts},
    )
