"""Sizes, durations and moments as people read them; the JSON output never uses these."""

from __future__ import annotations

import datetime

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(size_bytes: float) -> str:
    """``512 bytes``, ``64.0 KiB``, ``8.00 GiB``: three digits, powers of 1024."""
    amount = float(size_bytes)
    unit = 0
    while amount >= 999.5 and unit < len(UNITS) - 1:
        amount /= 1024
        unit += 1
    if unit == 0:
        return f"{amount:.0f} {UNITS[0]}" if amount != 1 else "1 byte"
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:.{digits}f} {UNITS[unit]}"


def rate(bytes_per_s: float) -> str:
    """A size a second."""
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float | None) -> str:
    """``340 ms``, ``3.21 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 07 min``, ``3 d 4 h``; a dash where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def moment(at_s: float) -> str:
    """Wall time (seconds since 1970) in the local zone, to the second."""
    return datetime.datetime.fromtimestamp(at_s, tz=datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def percent(part: int, whole: int) -> str:
    """``42%``; rounded down, so that 100% means all of it."""
    return f"{100 * part // whole if whole > 0 else 100}%"


RUNGS = {
    "bitmap": "dirty bitmap (unchanged since the view before)",
    "overlay": "live overlay (unchanged since the view before)",
    "map": "digest map (matched, xxh3-128)",
    "extents": "extents (reads as zero)",
    "digests": "full digests (matched, xxh3-128)",
}


def rung(code: str) -> str:
    """The rung of evidence in words."""
    return RUNGS.get(code, code)


def rung_name(code: str) -> str:
    """The same without what it claims: ``digest map``."""
    return rung(code).partition(" (")[0]


def step(name: str) -> str:
    """A step's name as a person reads it: ``last_pass`` is ``last pass``, ``pass:2`` is ``pass 2``."""
    return name.replace("_", " ").replace(":", " ")


def outcome(name: str | None) -> str:
    """How a run ended: ``rolled-back`` is ``rolled back``."""
    return "not final" if name is None else name.replace("-", " ")
