"""What the hypervisor in memory has to give for VMs that are made anew: folders as pools, files as volumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import DiskFull, HypervisorError
from agent.virt.provision_seam import HostProvisions, Pool, Volume

HEADER_BYTES = 4096
"""What a volume takes of its pool's room before anything is written to it."""


@dataclass(slots=True)
class FakePool:
    """A pool; `room_bytes`: how much fits in altogether."""

    path: Path
    active: bool = True
    kind: str = "dir"
    room_bytes: int = 1 << 40


@dataclass(slots=True)
class FakeStorage:
    """The pools of a machine, and the rest of what it provides. `before_create` may die in the middle of an act."""

    pools: dict[str, FakePool] = field(default_factory=dict)
    machines: tuple[str, ...] = ("pc-i440fx-7.2", "pc")
    files: tuple[str, ...] = ()
    after_create: Callable[[Path], object] = field(default=lambda path: None)

    def used_bytes(self, pool: str) -> int:
        return HEADER_BYTES * len(list(self.pools[pool].path.iterdir()))


class FakeProvider:
    """The part of `FakeHypervisor` that `agent.virt.provision_seam.Provider` asks for."""

    def __init__(self, storage: FakeStorage) -> None:
        self.volumes = storage

    def provisions(self, arch: str, virt_type: str, machine: str) -> HostProvisions:
        if arch != "x86_64" or virt_type not in ("qemu", "kvm"):
            return HostProvisions(pools=self._pools())
        return HostProvisions(
            machines=self.volumes.machines,
            cpu_modes=("host-model", "custom"),
            cpu_models=("qemu64",),
            firmware=("bios", "efi"),
            files=self.volumes.files,
            tpm_models=("tpm-tis",),
            pools=self._pools(),
        )

    def _pools(self) -> tuple[Pool, ...]:
        return tuple(
            Pool(
                name=name,
                kind=pool.kind,
                path=pool.path,
                active=pool.active,
                free_bytes=max(0, pool.room_bytes - self.volumes.used_bytes(name)) if pool.active else 0,
            )
            for name, pool in sorted(self.volumes.pools.items())
        )

    def find_volume(self, pool: str, name: str) -> Volume | None:
        path = self._pool(pool).path / name
        return Volume(pool=pool, name=name, path=path) if path.exists() else None

    def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> Volume:
        where = self._pool(pool)
        path = where.path / name
        if where.kind != "dir" or image_format not in ("raw", "qcow2") or path.exists():
            raise HypervisorError(f"The volume {name} cannot be made in {pool}.", pool=pool)
        if self.volumes.used_bytes(pool) + HEADER_BYTES > where.room_bytes:
            raise DiskFull(f"The pool {pool} has no room for the volume {name}.", pool=pool)
        with path.open("wb") as image:
            image.truncate(size_bytes)
        self.volumes.after_create(path)
        return Volume(pool=pool, name=name, path=path)

    def remove_volume(self, pool: str, name: str) -> None:
        (self._pool(pool).path / name).unlink(missing_ok=True)

    def _pool(self, name: str) -> FakePool:
        found = self.volumes.pools.get(name)
        if found is None or not found.active:
            raise HypervisorError(f"This host has no active storage pool {name}.", pool=name)
        return found
