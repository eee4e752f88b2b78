"""The coordinator's configuration: one TOML file, everything optional.

.. code-block:: toml

    state_dir = "/var/lib/failback"          # database, locks
    hooks_dir = "/etc/failback/hooks.d"      # hold/ and resume/ hold the administrator's executables
    hook_timeout_s = 300.0

    [pki]                                    # this coordinator's identity, made by `failback pki`
    ca = "/etc/failback/pki/ca.crt"
    certificate = "/etc/failback/pki/coordinator.crt"
    key = "/etc/failback/pki/coordinator.key"

    [hosts.prod1]                            # the name in the agent's certificate
    address = "192.0.2.10"                   # default: the host's name
    port = 9860                              # default
    bulk_address = "198.51.100.10"           # default: address
    bulk_port = 9861                         # default: what the agent says
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cattrs
from cattrs import transform_error
from cattrs.v import format_exception

from coordinator.errors import UsageError

DEFAULT_FILE = Path("/etc/failback/coordinator.toml")
DEFAULT_PORT = 9860
ENVIRONMENT = "FAILBACK_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class PkiFiles:
    """PEM files of the coordinator's identity."""

    ca: Path = Path("/etc/failback/pki/ca.crt")
    certificate: Path = Path("/etc/failback/pki/coordinator.crt")
    key: Path = Path("/etc/failback/pki/coordinator.key")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How an agent is reached; None: see the defaults above."""

    address: str | None = None
    port: int = DEFAULT_PORT
    bulk_address: str | None = None
    bulk_port: int | None = None


def default_state_dir() -> Path:
    """``/var/lib/failback`` for root, the user's XDG state folder otherwise (XDG Base Directory Specification)."""
    if os.geteuid() == 0:
        return Path("/var/lib/failback")
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "failback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the coordinator is told from outside."""

    state_dir: Path = field(default_factory=default_state_dir)
    hooks_dir: Path = Path("/etc/failback/hooks.d")
    hook_timeout_s: float = 300.0
    pki: PkiFiles = PkiFiles()
    hosts: dict[str, HostConfig] = field(default_factory=dict)

    def host(self, name: str) -> HostConfig:
        """How to reach the host of that name; one that is not configured is reached by its own name."""
        return self.hosts.get(name, HostConfig())

    @property
    def database(self) -> Path:
        """The registry and journal."""
        return self.state_dir / "registry.sqlite"


def _port(value: object, _: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("must be a whole number")
    return value


def _seconds(value: object, _: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise TypeError("must be a number of seconds above 0")
    return float(value)


def _text(value: object, _: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("must be text")
    return value


def _path(value: object, _: object) -> Path:
    if not isinstance(value, str) or not Path(value).is_absolute():
        raise TypeError("must be an absolute path")
    return Path(value)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, hook in ((int, _port), (float, _seconds), (str, _text), (Path, _path)):
        converter.register_structure_hook(kind, hook)
    return converter


def _reason(error: BaseException, kind: type | None) -> str:
    if isinstance(error, TypeError) and str(error).startswith("must be"):
        return str(error)
    return format_exception(error, kind)


def parse_config(text: str, origin: str) -> Config:
    """The configuration written in `text`; `origin` names the file in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} is not valid TOML: {error}; correct it", code="config", file=origin) from error
    try:
        config = _converter().structure(values, Config)
    except cattrs.BaseValidationError as error:
        reasons = "; ".join(line.replace("@ $.", "at ") for line in transform_error(error, format_exception=_reason))
        raise UsageError(f"{origin} says something it must not: {reasons}", code="config", file=origin) from error
    for name, host in config.hosts.items():
        for port in (host.port, host.bulk_port):
            if port is not None and not 0 < port < 65536:
                raise UsageError(
                    f"{origin}: host {name} has port {port}; ports are 1 to 65535", code="config", file=origin
                )
    return config


def load_config(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """Read `file`, else what FAILBACK_CONFIG names, else /etc/failback/coordinator.toml if it is there.

    Raises:
        UsageError: a file that was named is missing or unreadable, is not TOML, or says what it must not.
    """
    variables = os.environ if environment is None else environment
    named = file or (Path(variables[ENVIRONMENT]) if variables.get(ENVIRONMENT) else None)
    path = named or DEFAULT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if named is None:
            return Config()
        raise UsageError(
            f"there is no configuration file {path}: make it, or leave out --config and {ENVIRONMENT}", code="config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the configuration file {path} cannot be read: {reason}", code="config") from error
    return parse_config(text, str(path))
