"""``failback completion``: the script that makes a shell complete verbs, options and pair names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from coordinator.cli.session import Session
from coordinator.cli.verb import verb

SHELLS = ("bash", "zsh", "fish")


@verb("completion", "Print the completion script for a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Example:
      failback completion bash > /etc/bash_completion.d/failback
      failback completion zsh  > "${fpath[1]}/_failback"
      failback completion fish > ~/.config/fish/completions/failback.fish
    """
    session = ctx.find_root().obj
    assert isinstance(session, Session)
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "failback", "_FAILBACK_COMPLETE").source()
    if not session.as_json:
        session.output.stdout.write(script + "\n")
    session.output.finish({"verb": "completion", "shell": shell, "script": script})
