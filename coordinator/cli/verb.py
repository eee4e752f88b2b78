"""What every verb has in common: ``--json`` may also stand behind it, and its help shows an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from coordinator.cli.session import Session

TWO_WORDS = {"--switch": ("at",), "--to": ("vm", "host")}
"""Options, and the words of theirs that another word follows."""


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    session = ctx.find_root().obj
    if value and isinstance(session, Session):
        session.as_json = True


class Teaching(click.Command):
    """A command whose help goes where all its words go, so that a full disk is noticed and a lost reader is not."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """click's own, with another hand that writes it."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option


class TeachingGroup(Teaching, click.Group):
    """A verb that has verbs of its own."""


def _show_help(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        session = ctx.find_root().obj
        assert isinstance(session, Session)
        session.output.stdout.write(ctx.get_help() + "\n")
        ctx.exit()


class Verb(Teaching):
    """A command with ``--json`` of its own."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.params.append(
            click.Option(
                ["--json"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_set_json,
                help="End with exactly one JSON object on standard output.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``--switch at TIME`` and ``--to vm HOST:NAME`` as they are spoken: two words of one value."""
        joined: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            if word == "--":
                joined += rest
                break
            if len(rest) > 1 and rest[0] in TWO_WORDS.get(word, ()):
                joined.append(f"{rest.pop(0)} {rest.pop(0)}")
        return super().parse_args(ctx, joined)


def verb(name: str, short_help: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function the verb of that name. It returns the exit code (None: done)."""
    return click.command(name, cls=Verb, short_help=short_help)
