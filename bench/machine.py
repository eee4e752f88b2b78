"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def describe() -> dict[str, object]:
    """Processor, cores, memory, kernel, tools, and how busy it was at the end; plain values for JSON."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": next(models, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": _version("qemu-img"),
        "rsync": _version("rsync"),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return "missing"
    first = done.stdout.splitlines()[:1]
    return " ".join(first[0].split()[:4]) if first else "unknown"
