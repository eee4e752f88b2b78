"""Certificates of a lab, made by the product's own `failback pki` code."""

from __future__ import annotations

from pathlib import Path

from coordinator import pki
from tests.lab.agent_process import Identity


class LabPki:
    """A certificate authority in `folder` (made when missing) and who got a certificate of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        pki.init_ca(folder)

    def agent(self, host: str) -> Identity:
        """Identity of the agent of `host`."""
        return _identity(pki.issue_agent(self._folder, host))

    def coordinator(self) -> Identity:
        """Identity of a coordinator."""
        return _identity(pki.issue_coordinator(self._folder))


def _identity(issued: pki.Issued) -> Identity:
    return Identity(issued.ca, issued.certificate, issued.key)
