"""The file of a plan of several pairs: read strictly, every mistake told in a sentence, all at once.

.. code-block:: toml

    parallel = 4                 # pairs that are copied at once
    parallel-per-host = 2        # so many of them with the same host at either side

    [defaults]                   # options of `failback start`, for every pair
    shutdown-timeout = "10m"

    [[group]]
    name = "databases"
    pairs = ["db1", "db2"]

    [[group]]
    name = "applications"
    after = ["databases"]        # default: the group before it in the file; []: none
    delay = "2m"                 # after the last of them came home
    on-failed = "hold"           # or "go-on": what a pair before it that does not come home means
    pairs = ["app1"]

    [pair.app1]                  # options of one pair, above the defaults
    max-downtime = "30s"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from coordinator.cli.parameters import DURATION_S
from coordinator.cli.planning import chosen_options, run_options
from coordinator.errors import UsageError
from coordinator.fleet import PARALLEL, PARALLEL_PER_HOST, FleetPlan, Group, OnFailed
from coordinator.model import PAIR_NAME, RunOptions, SwitchPolicy
from coordinator.switch_order import PAST

TOP_KEYS = ("parallel", "parallel-per-host", "defaults", "group", "pair")
GROUP_KEYS = ("name", "pairs", "after", "delay", "on-failed")
MOST_PARALLEL = 64
MAX_BYTES = 1 << 20
"""No plan that a person writes is larger."""


def load_plan(file: Path, *, begins: bool = False) -> FleetPlan:
    """Read the plan in that file. `begins`: runs are to begin with it, so that a time to switch must not be past.

    Raises:
        UsageError: it cannot be read, is not TOML, or says what it must not: every mistake in one sentence each.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no plan file {file}: name one that is there, see docs/FLEET.md") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the plan file {file} cannot be read: {reason}; mend that and repeat") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"the plan file {file} has more than {MAX_BYTES} bytes: name the file of a plan")
    return parse_plan(text, str(file), begins=begins)


def parse_plan(text: str, origin: str, *, begins: bool = False) -> FleetPlan:
    """The plan written in `text`; `origin` names the file in errors. Raises as `load_plan` does."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} is not valid TOML: {error}; correct it", code="plan-file", file=origin) from error
    reader = _Reader(values, begins=begins)
    plan = reader.plan()
    mistakes = list(reader.mistakes)
    if not mistakes:
        try:
            plan.in_order()
        except UsageError as error:
            mistakes.append(error.sentence)
    if mistakes:
        listed = "; ".join(mistakes)
        raise UsageError(f"{origin} says something it must not: {listed}", code="plan-file", file=origin)
    return plan


class _Reader:
    """Turns the file's values into a plan, and collects what is wrong with them."""

    def __init__(self, values: Mapping[str, Any], *, begins: bool) -> None:
        self._values = values
        self._begins = begins
        self.mistakes: list[str] = []

    def plan(self) -> FleetPlan:
        """The plan; worth nothing where there are mistakes."""
        self._check_keys("", self._values, TOP_KEYS)
        groups = self._groups()
        pairs = [pair for group in groups for pair in group.pairs]
        return FleetPlan(
            groups=tuple(groups),
            options=self._options(groups, pairs),
            parallel=self._count("parallel", PARALLEL),
            parallel_per_host=self._count("parallel-per-host", PARALLEL_PER_HOST),
        )

    def _wrong(self, sentence: str) -> None:
        self.mistakes.append(sentence)

    def _check_keys(self, where: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in values:
            if key not in known:
                self._wrong(f"unknown key {where}{key} {_meant(key, known)}")

    def _count(self, key: str, default: int) -> int:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PARALLEL:
            self._wrong(f"{key} must be a whole number from 1 to {MOST_PARALLEL}")
            return default
        return value

    # --- groups -----------------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        tables = self._values.get("group")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            self._wrong("there must be at least one [[group]] with name and pairs")
            return []
        groups: list[Group] = []
        for number, table in enumerate(tables, start=1):
            before = groups[-1].name if groups else None
            groups.append(self._group(table, number, before))
        self._check_groups(groups)
        return groups

    def _group(self, table: Mapping[str, Any], number: int, before: str | None) -> Group:
        name = table.get("name")
        if not isinstance(name, str) or not name or not name.isprintable():
            self._wrong(f'group {number} must have a name, as in name = "databases"')
            name = f"{number}"
        where = f"group {name}: "
        self._check_keys(where, table, GROUP_KEYS)
        after = self._names(where, table, "after") if "after" in table else (before,) if before else ()
        policy = table.get("on-failed", OnFailed.HOLD.value)
        if policy not in [choice.value for choice in OnFailed]:
            self._wrong(f'{where}on-failed is {policy!r}: write "hold" or "go-on"')
            policy = OnFailed.HOLD.value
        pairs = self._names(where, table, "pairs")
        if not pairs:
            self._wrong(f'{where}pairs must name at least one pair, as in pairs = ["db1"]')
        for pair in pairs:
            if PAIR_NAME.fullmatch(pair) is None:
                self._wrong(f"{where}{pair!r} is no name for a pair: 1 to 63 of a-z, 0-9 and -, the first one no dash")
        return Group(name=name, pairs=pairs, after=after, delay_s=self._delay(where, table), on_failed=OnFailed(policy))

    def _names(self, where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._wrong(f'{where}{key} must be a list of names, as in {key} = ["a", "b"]')
            return ()
        return tuple(value)

    def _delay(self, where: str, table: Mapping[str, Any]) -> float:
        value = table.get("delay", 0)
        if value == 0 and not isinstance(value, bool):
            return 0.0
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise click.BadParameter(f"{value!r} is no length of time: write 900s, 15m or 1h")
            return DURATION_S.convert(str(value), None, None)
        except click.BadParameter as error:
            self._wrong(f"{where}delay: {error.message}")
            return 0.0

    def _check_groups(self, groups: Sequence[Group]) -> None:
        names = [group.name for group in groups]
        for name in _twice(names):
            self._wrong(f"two groups have the name {name}: give each its own")
        for pair in _twice(pair for group in groups for pair in group.pairs):
            self._wrong(f"the pair {pair} stands in the plan twice: leave it in one place")
        for group in groups:
            for name in group.after:
                if name not in names:
                    self._wrong(f"group {group.name}: after names {name}, which is no group {_meant(name, names)}")

    # --- options ----------------------------------------------------------------------------------------------------

    def _options(self, groups: Sequence[Group], pairs: Sequence[str]) -> dict[str, RunOptions]:
        defaults = self._values.get("defaults", {})
        if not isinstance(defaults, dict):
            self._wrong("defaults must be a table of options: [defaults]")
            defaults = {}
        own = self._values.get("pair", {})
        if not isinstance(own, dict) or not all(isinstance(table, dict) for table in own.values()):
            self._wrong("pair must hold a table of options for each pair, as in [pair.db1]")
            own = {}
        for name in own:
            if name not in pairs:
                self._wrong(f"[pair.{name}] is about a pair that is in no group {_meant(name, pairs)}")
        if self._chosen("[defaults] ", defaults) is None:
            return {}
        chosen = {}
        for group in groups:
            for pair in group.pairs:
                options = self._chosen(f"[pair.{pair}] ", {**defaults, **own.get(pair, {})})
                if options is not None:
                    chosen[pair] = _in_turn(options) if group.after else options
        return chosen

    def _chosen(self, where: str, values: Mapping[str, Any]) -> RunOptions | None:
        """The options as `failback start` would take them; None where they are wrong."""
        before = len(self.mistakes)
        words = [word for key, value in values.items() for word in self._words(where, key, value)]
        if len(self.mistakes) > before:
            return None
        try:
            with _start_options.make_context("start", words) as context:
                return chosen_options(**context.params)
        except click.UsageError as error:
            self._wrong(where + error.format_message().rstrip("."))
        except UsageError as error:
            if error.code == PAST and not self._begins:
                return RunOptions()  # the runs have theirs in the journal, and these are for nobody
            self._wrong(where + error.sentence)
        return None

    def _words(self, where: str, key: str, value: Any) -> list[str]:
        """The words of the command line that say the same."""
        option = _OPTIONS.get(key)
        if option is None:
            self._wrong(f"{where}unknown option {key} {_meant(key, list(_OPTIONS))}")
            return []
        if option.is_flag:
            if not isinstance(value, bool):
                self._wrong(f"{where}{key} must be true or false")
                return []
            return [f"--{key}"] if value else list(option.secondary_opts)
        values = value if option.multiple and isinstance(value, list) else [value]
        for one in values:
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                self._wrong(f"{where}{key} must be text or a number, as after --{key}")
                return []
        return [f"--{key}={one}" for one in values]


@click.command("start")
@run_options
def _start_options(**_chosen: Any) -> None:
    """Takes the options of a run."""


_OPTIONS = {
    name.removeprefix("--"): option
    for option in _start_options.params
    if isinstance(option, click.Option)
    for name in option.opts
    if name.startswith("--")
}


def _in_turn(options: RunOptions) -> RunOptions:
    """The same, for a pair that others come before: it waits for its turn. One that waits for a person goes on to."""
    if options.switch is SwitchPolicy.MANUAL:
        return options
    return replace(options, switch=SwitchPolicy.TURN)


def _twice(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for name in names:
        if name in seen:
            twice[name] = None
        seen.add(name)
    return list(twice)


def _meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"(did you mean {close[0]}?)"
    return f"(known: {', '.join(known)})" if len(known) <= 6 else "(`failback start --help` lists them)"
