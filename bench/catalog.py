"""Every benchmark by name, with the target it has to meet. Targets stand here and nowhere else."""

from __future__ import annotations

from bench.benchmark import Benchmark
from bench.comparing import beside_peers, cold_vs_read, compare_vs_rsync, identical_vs_limit, throughput
from bench.footprint import memory
from bench.full import full_vs_nbdcopy
from bench.impact import guest_impact
from bench.links import link_use, wan_use, wire_vs_zstd
from bench.live import compare_live, qcow2_speed
from bench.measure import Target
from bench.profiling import profile
from bench.shapes import sparse, two_disks
from bench.switching import downtime, prediction, tracked_scale
from bench.tls import tls_vs_blocking

_ALL = (
    Benchmark("compare-vs-rsync", "8 GiB raw, 3% changed, warm ÷ rsync", compare_vs_rsync, Target(value=0.20)),
    Benchmark("compare-live", "a running qcow2 VM's view, 3% changed ÷ rsync", compare_live, Target(value=0.35)),
    Benchmark("identical-vs-limit", "identical images, warm ÷ only reading", identical_vs_limit, Target(value=1.5)),
    Benchmark("cold-vs-read", "3% changed, cold ÷ only reading, cold", cold_vs_read, Target(value=1.15)),
    Benchmark(
        "wire-vs-zstd",
        "bytes on the wire at 1 Gbit/s ÷ zstd -3 of the changed pages",
        wire_vs_zstd,
        Target(value=1.10),
        needs_root=True,
    ),
    Benchmark("full-vs-nbdcopy", "full transfer over TLS ÷ nbdcopy --flush", full_vs_nbdcopy, Target(value=0.8)),
    Benchmark(
        "tls-vs-blocking",
        "a bulk connection ÷ plain blocking ssl sockets",
        tls_vs_blocking,
        Target(value=0.8, better="higher"),
    ),
    Benchmark(
        "link-use",
        "1 Gbit/s, incompressible: ours ÷ a plain stream",
        link_use,
        Target(value=0.97, better="higher"),
        needs_root=True,
    ),
    Benchmark(
        "wan-use",
        "the same over a round trip of 100 ms",
        wan_use,
        Target(value=0.90, better="higher"),
        needs_root=True,
    ),
    Benchmark("two-disks", "two disks at once ÷ one of their combined size", two_disks, Target(value=1.1)),
    Benchmark("memory", "private memory of an agent, MiB, on disks of 1 TiB", memory, Target(value=256)),
    Benchmark("throughput", "GB/s of disk by share changed", throughput),
    Benchmark("sparse", "8 TiB with 1 GiB of data ÷ 2 GiB with the same", sparse, Target(value=1.2)),
    Benchmark("tracked-scale", "a tracked last pass, 64 MiB changed: 1 TiB ÷ 8 GiB", tracked_scale, Target(value=1.3)),
    Benchmark("downtime", "seconds from power-off to power-on, two qcow2 disks", downtime, Target(value=3)),
    Benchmark(
        "prediction",
        "how far the downtime foretold was off, at worst",
        prediction,
        Target(value=0.30),
        needs_root=True,
    ),
    Benchmark(
        "guest-impact",
        "a guest's writes with background passes ÷ without",
        guest_impact,
        Target(value=0.9, better="higher"),
    ),
    Benchmark("qcow2-speed", "closed qcow2 images ÷ raw images", qcow2_speed, Target(value=1.2)),
    Benchmark("peers", "3% changed, warm ÷ the fastest of rsync, qemu-img, nbdcopy", beside_peers),
    Benchmark("profile", "processor seconds per GB of disk, and where they go", profile),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
