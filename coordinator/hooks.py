"""The administrator's executables around a run: ``hooks.d/hold`` before it, ``hooks.d/resume`` after its commit.

Every executable regular file of the folder is run, in the order of its name, one after another. Exit code 0 goes on;
anything else, or no end within the time limit, stops the run with that hook's last line of standard error. A hook may
be run again after a crash: it must be harmless when repeated. Its environment is the coordinator's, with
``FAILBACK_HOOK`` (hold or resume), ``FAILBACK_PAIR``, ``FAILBACK_RUN``, ``FAILBACK_ORIGINAL_HOST``,
``FAILBACK_ORIGINAL_VM``, ``FAILBACK_REPLICA_HOST`` and ``FAILBACK_REPLICA_VM``.
"""

from __future__ import annotations

import enum
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import trio

from coordinator.errors import CoordinatorError
from coordinator.model import Pair


class HookFailed(CoordinatorError):
    """A hook ended with another exit code than 0, did not end in time, or could not be run."""

    code = "hook-failed"


class Hook(enum.Enum):
    """Which folder of hooks."""

    HOLD = "hold"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """The administrator's hooks. `timeout_s` holds for each executable."""

    folder: Path
    timeout_s: float

    def found(self, hook: Hook) -> tuple[Path, ...]:
        """The executables of that folder in the order they run; none when there is no folder."""
        try:
            files = sorted((self.folder / hook.value).iterdir(), key=lambda path: path.name)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise HookFailed(
                f"the folder of hooks {self.folder / hook.value} cannot be read: {error.strerror}; mend its permissions"
            ) from error
        return tuple(path for path in files if _executable(path))

    async def run(self, hook: Hook, pair: Pair, run: str) -> tuple[str, ...]:
        """Run the hooks of that folder; returns the names of those that ran.

        Raises:
            HookFailed: one did not end with 0; those after it were not run.
        """
        environment = {
            **os.environ,
            "FAILBACK_HOOK": hook.value,
            "FAILBACK_PAIR": pair.name,
            "FAILBACK_RUN": run,
            "FAILBACK_ORIGINAL_HOST": pair.original.host,
            "FAILBACK_ORIGINAL_VM": pair.original.name,
            "FAILBACK_REPLICA_HOST": pair.replica.host,
            "FAILBACK_REPLICA_VM": pair.replica.name,
        }
        executables = self.found(hook)
        for path in executables:
            await self._run_one(path, environment)
        return tuple(path.name for path in executables)

    async def _run_one(self, path: Path, environment: dict[str, str]) -> None:
        cure = "correct what it complains of, then `failback resume` the pair"
        try:
            with trio.fail_after(self.timeout_s):
                ended = await trio.run_process(
                    [str(path)],
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                    env=environment,
                )
        except trio.TooSlowError as error:
            raise HookFailed(
                f"the hook {path} did not end within {self.timeout_s:.0f} s and was stopped; {cure}", hook=str(path)
            ) from error
        except OSError as error:
            raise HookFailed(f"the hook {path} cannot be run: {error.strerror}; {cure}", hook=str(path)) from error
        if ended.returncode != 0:
            said = ended.stderr.decode(errors="replace").strip().splitlines()
            last = f" and said: {said[-1][:200]}" if said else ""
            raise HookFailed(
                f"the hook {path} ended with {ended.returncode}{last}; {cure}",
                hook=str(path),
                exit_code=ended.returncode,
            )


def _executable(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) and os.access(path, os.X_OK)
