"""The words of the command line: what each argument must look like, checked before anything else happens."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import click
from click.shell_completion import CompletionItem

from coordinator.cli.session import Session
from coordinator.model import PAIR_NAME, DiskPair, Rate

SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|m|h)?")
RATE_WORDS = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:(?:([kKmMgGtT])(i)?)?(B|bit))?(?:/s)?", re.ASCII)
"""Number, prefix, binary prefix, unit. A small b is not taken: to some it is a byte, to others a bit."""
MAX_DURATION_S = 7 * 24 * 3600.0


class PairName(click.ParamType[str]):
    """The name of a pair."""

    name = "PAIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself, if it is one."""
        if not isinstance(value, str) or PAIR_NAME.fullmatch(value) is None:
            self.fail(
                f"{value!r} is no name for a pair: use 1 to 63 of a-z, 0-9 and -, the first one no dash", param, ctx
            )
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The pairs of the registry that begin so; none where it cannot be read."""
        session = ctx.find_root().obj
        known = session.known_pairs() if isinstance(session, Session) else ()
        return [CompletionItem(name) for name in known if name.startswith(incomplete)]


class VmPlace(click.ParamType[tuple[str, str]]):
    """A VM on a host, written HOST/VM."""

    name = "HOST/VM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """(host, VM name or UUID)."""
        if isinstance(value, tuple):
            return value
        host, slash, vm = str(value).partition("/")
        if not (host and slash and vm):
            self.fail(f"{value!r} is not HOST/VM, as in prod1/web1", param, ctx)
        return host, vm


class DiskMapping(click.ParamType[DiskPair]):
    """One disk at both sides, written ORIGINAL=REPLICA."""

    name = "ORIGINAL=REPLICA"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> DiskPair:
        """The mapped disk."""
        if isinstance(value, DiskPair):
            return value
        original, equals, replica = str(value).partition("=")
        if not (original and equals and replica):
            self.fail(f"{value!r} is not ORIGINAL=REPLICA, as in vda=sda", param, ctx)
        return DiskPair(original=original, replica=replica)


class Duration(click.ParamType[float]):
    """A length of time: ``900s``, ``15m``, ``1h``; a bare number is seconds."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no length of time: write 900s, 15m or 1h", param, ctx)
        seconds = float(match[1]) * SECONDS[match[2] or "s"]
        if not 0 < seconds <= MAX_DURATION_S:
            self.fail(f"{value!r} is out of bounds: more than 0 and at most 7 days", param, ctx)
        return seconds


class RateType(click.ParamType[Rate]):
    """Bytes or bits a second: ``125MB``, ``119MiB``, ``1Gbit``, ``250000000``, with or without ``/s``; or ``none``."""

    name = "RATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        """The limit."""
        if isinstance(value, Rate):
            return value
        text = str(value).strip()
        if text.casefold() == "none":
            return Rate(None)
        match = RATE_WORDS.fullmatch(text)
        if match is None:
            self.fail(
                f"{value!r} is no rate: write bytes a second, as in 125MB, 119MiB or 250000000, bits a second, as in "
                "1Gbit or 800Mbit, or none",
                param,
                ctx,
            )
        number, prefix, binary, unit = match.groups()
        scale = (1024 if binary else 1000) ** (" kmgt".index(prefix.lower()) if prefix else 0)
        try:
            # Decimal, so that a tenth of a unit is exactly that.
            return Rate(int(Decimal(number) * scale / (8 if unit == "bit" else 1)))
        except ValueError as error:
            self.fail(f"{value!r} is too little or too much: {error}", param, ctx)


PAIR = PairName()
VM_PLACE = VmPlace()
DISK_MAPPING = DiskMapping()
DURATION_S = Duration()
RATE = RateType()
