"""The words of the command line: what each argument must look like, checked before anything else happens."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import click
from click.shell_completion import CompletionItem

from coordinator.cli.session import Session
from coordinator.model import PAIR_NAME, Destination, DiskPair, Home, Rate, SwitchPolicy

SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|m|h)?")
RATE_WORDS = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?(?:(?:([kKmMgGtT])(i)?)?(B|bit))?(?:/s)?", re.ASCII)
"""Number, prefix, binary prefix, unit. A small b is not taken: to some it is a byte, to others a bit."""
HOURS_MINUTES = re.compile(r"(?:[01]?\d|2[0-3]):[0-5]\d", re.ASCII)
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


class Moment(click.ParamType[float]):
    """A moment to come: ISO 8601 with its zone (``2031-01-31T02:00+01:00``), or the next local ``HH:MM``."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds since 1970."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip()
        how = "write a date and time with its zone, as in 2031-01-31T02:00+01:00, or HH:MM for the next local one"
        if HOURS_MINUTES.fullmatch(text):
            return next_local(text, datetime.now())  # noqa: DTZ005  # the wall clock of this machine is meant
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{value!r} is no time: {how}", param, ctx)
        if when.tzinfo is None:
            self.fail(f"{value!r} names no time zone: {how}", param, ctx)
        return when.timestamp()


def next_local(hours_minutes: str, now: datetime) -> float:
    """Seconds since 1970 of the next time that the local clock shows ``HH:MM``; `now`: local, without a zone."""
    hours, minutes = hours_minutes.split(":")
    when = now.replace(hour=int(hours), minute=int(minutes), second=0, microsecond=0)
    if when <= now:
        when += timedelta(days=1)
    return when.timestamp()


class SwitchWhen(click.ParamType[tuple[SwitchPolicy, float | None]]):
    """When to switch: ``auto``, ``manual``, or ``at TIME``."""

    name = "auto|manual|at TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[SwitchPolicy, float | None]:
        """The policy, and the time of AT (seconds since 1970)."""
        if isinstance(value, tuple):
            return value
        word, _, rest = str(value).strip().partition(" ")
        if word == SwitchPolicy.AT.value and rest:
            return SwitchPolicy.AT, MOMENT.convert(rest, param, ctx)
        if rest or word not in (SwitchPolicy.AUTO.value, SwitchPolicy.MANUAL.value):
            self.fail(f"{value!r} is none of auto, manual and at TIME (as in --switch at 02:00)", param, ctx)
        return SwitchPolicy(word), None


class WayHome(click.ParamType[Destination]):
    """Where to bring the data: ``original``, ``vm HOST:NAME``; ``host HOST`` is understood, for the plan to refuse."""

    name = "original|vm HOST:NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Destination:
        """The destination."""
        if isinstance(value, Destination):
            return value
        word, _, rest = str(value).strip().partition(" ")
        if word == Home.ORIGINAL.value and not rest:
            return Destination()
        host, colon, vm = rest.partition(":")
        if word == Home.VM.value and host and vm:
            return Destination(home=Home.VM, host=host, vm=vm)
        if word == Home.HOST.value and host and not colon:
            return Destination(home=Home.HOST, host=host)
        said = f"{value!r} is neither original nor vm HOST:NAME (as in --to vm prod2:web1)"
        raise click.BadParameter(said, ctx=ctx, param=param)


PAIR = PairName()
VM_PLACE = VmPlace()
DISK_MAPPING = DiskMapping()
DURATION_S = Duration()
RATE = RateType()
MOMENT = Moment()
SWITCH_WHEN = SwitchWhen()
WAY_HOME = WayHome()
