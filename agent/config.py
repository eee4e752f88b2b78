"""The agent's configuration: one TOML file, read once, typed and strict.

An unknown key, a missing key or a value of the wrong type is refused with the name of the key, because a setting that
is silently ignored is worse than an agent that does not start.
"""

from __future__ import annotations

import os
import socket
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from agent.errors import ConfigError

DEFAULT_PATH = Path("/etc/failback/agent.toml")
DEFAULT_CONTROL_PORT = 9860
DEFAULT_BULK_PORT = 9861


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Paths of the certificate authority, this host's certificate and key (PEM), made by `failback pki issue`."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtConfig:
    """How to reach this host's libvirt.

    Attributes:
        uri: ``qemu:///system`` by default; any QEMU URI, ``qemu:///embed?root=DIR`` included.
        scratch_dir: where scratch files and overlays of block devices go, for files stand beside their disk;
            the user QEMU runs as must be able to reach it.
        hook_dir: libvirt's folder of hooks for QEMU, where `failback-agent fence install` puts its own.
    """

    uri: str = "qemu:///system"
    scratch_dir: Path = Path("/var/lib/libvirt/images")
    hook_dir: Path = Path("/etc/libvirt/hooks/qemu.d")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchConfig:
    """When a view of a running VM is given up for want of room for its scratch files (see `agent.scratch`).

    Attributes:
        used_percent: so much of what was free when it was opened is used.
        reserve_mib: less than this is free, in MiB.
    """

    used_percent: int = 85
    reserve_mib: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of `failback-agent`.

    Attributes:
        name: this host's name, the one its certificate was issued for; the machine's host name by default.
        listen: address to listen on, all of them by default.
        control_port, bulk_port: TCP ports for orders and for data.
        state_dir: what must survive a restart (fences, epochs); on a local file system.
        runtime_dir: sockets of the qemu-nbd processes; a short path (a unix socket's has at most 107 bytes).
    """

    tls: TlsConfig
    name: str = field(default_factory=socket.gethostname)
    listen: str = "0.0.0.0"
    control_port: int = DEFAULT_CONTROL_PORT
    bulk_port: int = DEFAULT_BULK_PORT
    state_dir: Path = Path("/var/lib/failback/agent")
    runtime_dir: Path = Path("/run/failback-agent")
    libvirt: LibvirtConfig = field(default_factory=LibvirtConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(kind: type) -> None:
        def structure(value: object, _: type) -> object:
            if type(value) is not kind:
                raise ConfigError(f"must be of type {kind.__name__}, not {type(value).__name__}")
            return value

        converter.register_structure_hook(kind, structure)

    for kind in (str, int, bool):
        exactly(kind)

    def path(value: object, _: type) -> Path:
        if not isinstance(value, str) or not value:
            raise ConfigError("must be a path in quotes")
        return Path(value)

    converter.register_structure_hook(Path, path)
    return converter


def _explain(error: ClassValidationError, prefix: str = "") -> str:
    """The first thing wrong in `error`, as ``key: reason``."""
    for inner, note in error.group_exceptions()[0]:
        where = f"{prefix}{note.name}"
        if isinstance(inner, ClassValidationError):
            return _explain(inner, f"{where}.")
        if isinstance(inner, KeyError):
            return f'"{where}" is missing'
        return f'"{where}" {inner}'
    for inner in error.group_exceptions()[1]:
        if isinstance(inner, ForbiddenExtraKeysError):
            return f'"{prefix}{sorted(inner.extra_fields)[0]}" is not a setting'
        return f'"{prefix.rstrip(".")}" {inner}'
    return str(error)


def load(path: Path) -> Config:
    """Read and check the file at `path`.

    Raises:
        ConfigError: naming the file, the key and what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no configuration file {path}: write one (docs/INSTALL.md shows it) or name it with --config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}; correct that line") from error
    try:
        config = _converter().structure(values, Config)
    except ClassValidationError as error:
        raise ConfigError(f"the configuration file {path} is wrong: {_explain(error)}; correct it") from error
    _check(path, config)
    return config


def _check(path: Path, config: Config) -> None:
    for key, port in (("control_port", config.control_port), ("bulk_port", config.bulk_port)):
        if not 0 < port < 65536:
            raise ConfigError(f'the configuration file {path} is wrong: "{key}" must be from 1 to 65535, not {port}')
    if config.control_port == config.bulk_port:
        raise ConfigError(f"the configuration file {path} is wrong: control_port and bulk_port must differ")
    if not 1 <= config.scratch.used_percent <= 99 or config.scratch.reserve_mib < 1:
        raise ConfigError(
            f'the configuration file {path} is wrong: "scratch.used_percent" must be from 1 to 99 and '
            '"scratch.reserve_mib" at least 1'
        )
    for key, file in (("ca", config.tls.ca), ("certificate", config.tls.certificate), ("key", config.tls.key)):
        if not os.access(file, os.R_OK):
            raise ConfigError(
                f'"tls.{key}" in {path} names {file}, which is missing or not readable: '
                f"make it with `failback pki issue {config.name}` and copy it there"
            )
