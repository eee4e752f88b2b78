"""Handing a run over to systemd: the template unit ``failback@PAIR.service`` works, this process only watches."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from coordinator.errors import CoordinatorError

RUNTIME_DIR = Path("/run/systemd/system")
"""Exists where systemd is the service manager (sd_booted(3))."""

TEMPLATE = "failback@.service"
CALL_TIMEOUT_S = 60.0


class ServiceFailed(CoordinatorError):
    """systemd did not do what was asked of it."""

    code = "systemd"


def unit_of(pair: str) -> str:
    """The unit that works on that pair's run."""
    return f"failback@{pair}.service"


class Systemd:
    """The machine's service manager, asked through ``systemctl``.

    Args:
        runtime_dir: exists where systemd runs.
        program: name or path of systemctl.
    """

    def __init__(self, runtime_dir: Path = RUNTIME_DIR, program: str = "systemctl") -> None:
        self._runtime_dir = runtime_dir
        self._program = program

    def why_unusable(self) -> str | None:
        """Why no run can be handed over, as a clause; None when it can."""
        if not self._runtime_dir.is_dir():
            return "systemd does not run here"
        if shutil.which(self._program) is None:
            return f"there is no {self._program}"
        if self._call("cat", "--no-pager", TEMPLATE).returncode != 0:
            return f"the unit {TEMPLATE} is not installed"
        return None

    def start(self, pair: str) -> None:
        """Start the pair's unit and return at once; a failure of an earlier run does not stand in the way.

        Raises:
            ServiceFailed: systemctl said no.
        """
        unit = unit_of(pair)
        self._call("reset-failed", unit)  # fails where there is nothing to reset
        result = self._call("start", "--no-block", unit)
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines()
            raise ServiceFailed(
                f"systemd did not start {unit}: {said[-1] if said else f'systemctl ended with {result.returncode}'}; "
                f"mend that, or go on with `failback resume {pair} --foreground`",
                unit=unit,
            )

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._program, *arguments], capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceFailed(
                f"`{self._program} {' '.join(arguments)}` did not answer: {error}; use --foreground"
            ) from error
