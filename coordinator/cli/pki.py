"""``failback pki``: the certificates by which coordinator and agents know each other."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.cli.session import Session
from coordinator.cli.verb import TeachingGroup, verb
from coordinator.pki import Issued, init_ca, issue_agent, issue_coordinator


def _folder(session: Session, folder: Path | None) -> Path:
    return folder if folder is not None else session.config().pki.ca.parent


_FOLDER = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the authority (default: where the configuration says the CA is).",
)


@click.group("pki", cls=TeachingGroup, short_help="Make the certificates of coordinator and agents.")
def command() -> None:
    """Make the certificates by which coordinator and agents know each other.

    \b
    Example:
      failback pki init
      failback pki issue prod1 --address 192.0.2.10
    """


def _tell(session: Session, issued: Issued, what: str) -> None:
    session.output.say(f"{what}: {issued.certificate} (key {issued.key}), good until {issued.not_after:%Y-%m-%d}.")


@verb("init", "Make the authority and the coordinator's certificate.")
@_FOLDER
@click.pass_obj
def init(session: Session, folder: Path | None) -> None:
    """Make the certificate authority and the coordinator's own certificate. Nothing is ever overwritten.

    \b
    Example:
      failback pki init
    """
    place = _folder(session, folder)
    authority = init_ca(place)
    coordinator = issue_coordinator(place)
    _tell(session, authority, "Certificate authority")
    _tell(session, coordinator, "Coordinator's certificate")
    session.output.say("Next: `failback pki issue HOST` for each host that runs an agent.")
    session.output.finish({"verb": "pki init", "authority": _plain(authority), "coordinator": _plain(coordinator)})


@verb("issue", "Make the certificate of the agent on a host.")
@click.argument("host")
@click.option(
    "--address", "addresses", multiple=True, metavar="IP|NAME", help="Another address or name of it; may be repeated."
)
@_FOLDER
@click.pass_obj
def issue(session: Session, host: str, addresses: tuple[str, ...], folder: Path | None) -> None:
    """Make the certificate of the agent on HOST and say which files to copy there.

    HOST is the name by which `register` and the configuration know it.

    \b
    Example:
      failback pki issue prod1 --address 192.0.2.10
    """
    issued = issue_agent(_folder(session, folder), host, aliases=addresses)
    _tell(session, issued, f"Certificate of {host}")
    session.output.say(
        f"Copy {issued.ca.name}, {issued.certificate.name} and {issued.key.name} to {host} and name them in its "
        "agent.toml; "
        "then delete the key here."
    )
    session.output.finish({"verb": "pki issue", "host": host, "issued": _plain(issued)})


def _plain(issued: Issued) -> dict[str, object]:
    return {
        "certificate": issued.certificate,
        "key": issued.key,
        "ca": issued.ca,
        "fingerprint": issued.fingerprint,
        "not_after": issued.not_after.isoformat(),
        "names": issued.names,
    }


command.add_command(init)
command.add_command(issue)
