"""The `failback` command: global options, every verb, and what becomes of errors."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from coordinator.cli import (
    adopt,
    backup,
    cancel,
    commit,
    completion,
    doctor,
    failover,
    forget,
    history,
    limit,
    pairs,
    pki,
    plan,
    readmit,
    register,
    restore_points,
    resume,
    start,
    status,
    switch,
    undo,
    watch,
)
from coordinator.cli.bugs import keep_trace
from coordinator.cli.session import Session, first_cause
from coordinator.cli.verb import TeachingGroup
from coordinator.errors import CoordinatorError, ExitCode, UsageError


class Stopped(CoordinatorError):
    """A person pressed Ctrl-C where nothing was under way."""

    code = "stopped"


class Bug(CoordinatorError):
    """An error nobody foresaw; its trace is in a file."""

    code = "bug"


class Program(TeachingGroup):
    """The group, with one place where every error becomes one sentence (or one JSON object) and an exit code."""

    def main(  # type: ignore[override]  # click's own signature has overloads that differ by `standalone_mode`
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run and exit with the code of `coordinator.errors.ExitCode`."""
        words = list(sys.argv[1:] if args is None else args)
        given = extra.pop("obj", None)
        session = given if isinstance(given, Session) else Session()
        session.as_json = session.as_json or "--json" in words  # known before click knows it, for its own errors
        extra["standalone_mode"] = False
        try:
            code = super().main(args=words, prog_name=prog_name or "failback", obj=session, **extra)
        except BaseException as error:  # noqa: BLE001  # the one place where everything ends
            code = report(session, error)
        leave(session, int(code or 0))


def report(session: Session, error: BaseException) -> int:
    """Say what happened in one sentence; the exit code."""
    if isinstance(error, BaseExceptionGroup):
        error = first_cause(error)
    told: CoordinatorError
    match error:
        case click.exceptions.NoArgsIsHelpError() if not session.as_json:
            session.output.stderr.write(error.format_message() + "\n")
            return ExitCode.USAGE
        case click.ClickException():
            told = UsageError(_usage_sentence(error))
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else ExitCode.FAILED
        case click.Abort() | KeyboardInterrupt():
            told = Stopped("stopped before anything was done")
        case CoordinatorError():
            told = error
        case _:
            place = keep_trace(session, error)
            told = Bug(
                f"an error nobody foresaw, {type(error).__name__}; its trace is in {place}: please report it with "
                "that file",
                log=str(place),
            )
    session.output.fail(told)
    return told.exit_code


def _usage_sentence(error: click.ClickException) -> str:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "no verb was given; see `failback --help`"
    sentence = re.sub(r"[.;] (Did you mean .*)\?$", r" (\1?)", error.format_message().strip()).rstrip(".")
    sentence = sentence.replace("(Did", "(did")
    context = getattr(error, "ctx", None)
    path = context.command_path if isinstance(context, click.Context) else "failback"
    return f"{sentence[:1].lower()}{sentence[1:]}; see `{path} --help`"


def leave(session: Session, code: int) -> NoReturn:
    """Exit; a reader that went away (`failback pairs | head -1`) is no error of ours, output that is cut short is."""
    output = session.output
    output.stdout.flush()
    if output.stdout.why_incomplete is not None:
        output.errors.print(
            f"failback: the output could not be written whole: {output.stdout.why_incomplete}; make room and ask "
            "again, what was done stands",
            soft_wrap=True,
        )
        code = code or ExitCode.FAILED
    for stream in (output.stdout, output.stderr):
        stream.flush()
        if stream.lost:
            stream.detach_descriptor()
    sys.exit(code)


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        session = ctx.ensure_object(Session)
        number = importlib.metadata.version("failback")
        session.output.say(f"failback {number}")
        session.output.finish({"verb": "version", "version": number})
        ctx.exit()


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration (default: $FAILBACK_CONFIG, else /etc/failback/coordinator.toml if it is there).",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the registry, instead of the configured one.",
)
@click.option("--json", "as_json", is_flag=True, help="End with exactly one JSON object on standard output.")
@click.option("--no-color", is_flag=True, help="No colours (NO_COLOR in the environment does the same).")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.pass_obj
def cli(session: Session, config_file: Path | None, state_dir: Path | None, as_json: bool, no_color: bool) -> None:
    """Bring a VM's work home from its replica, prove it, and undo it until you commit.

    \b
    The usual way:
      failback register web1 --original prod1/web1 --replica dr1/web1
      failback failover web1      the replica took over: record it
      failback plan web1          what a failback would do, and every reason against it
      failback start web1         do it, with progress
      failback commit web1        make it final (or: failback undo web1)

    Exit codes: 0 done, 1 failed or stopped, 2 wrong usage, 3 refused, 4 needs an operator.
    """
    session.config_file = config_file
    session.state_dir = state_dir
    session.as_json = session.as_json or as_json
    session.no_color = no_color


for verb in (
    register,
    failover,
    plan,
    start,
    status,
    watch,
    commit,
    undo,
    cancel,
    resume,
    switch,
    limit,
    pairs,
    history,
    restore_points,
    backup,
    doctor,
    adopt,
    forget,
    readmit,
    pki,
    completion,
):
    cli.add_command(verb.command)


def main() -> NoReturn:
    """Entry point of the ``failback`` script."""
    cli.main()
