"""The registry: pairs and hosts. Plain functions of a connection; each is one part of somebody's transaction."""

from __future__ import annotations

from sqlalchemy import Connection, Row, delete, insert, select, update

from coordinator import schema
from coordinator.errors import CoordinatorError, ExitCode, UsageError
from coordinator.model import DiskPair, FormerOriginal, Newest, OperatorCall, OriginalFlag, Pair, State, VmRef
from coordinator.plain import from_json, one_of, to_json
from coordinator.states import check_move
from protocol.messages import HostDescription


class Superseded(CoordinatorError):
    """Another process has taken the run over under a higher epoch; this one must not act any more."""

    code = "superseded"
    exit_code = ExitCode.REFUSED  # to be started again would take the run back


def add_pair(connection: Connection, pair: Pair) -> None:
    """Take a new pair in; `UsageError` when one of the VMs is taken."""
    _check_free(connection, pair)
    connection.execute(insert(schema.pairs).values(name=pair.name, **_columns(pair)))


def change_pair(connection: Connection, pair: Pair) -> None:
    """Write a known pair anew (see `coordinator.mapping.revised`); `UsageError` when one of the VMs is taken."""
    _check_free(connection, pair)
    _set(connection, pair.name, **_columns(pair))


def find_pair(connection: Connection, name: str) -> Pair | None:
    """The pair of that name, or None."""
    row = connection.execute(select(schema.pairs).where(schema.pairs.c.name == name)).one_or_none()
    return None if row is None else _pair(row)


def _check_free(connection: Connection, pair: Pair) -> None:
    for other in list_pairs(connection):
        former = () if other.former is None else (other.former.vm,)
        taken = {(vm.host, vm.uuid) for vm in (other.original, other.replica, *former)}
        for vm in (pair.original, pair.replica):
            if other.name != pair.name and (vm.host, vm.uuid) in taken:
                raise UsageError(
                    f"the VM {vm.name} on {vm.host} belongs to the pair {other.name}: name another VM", code="vm-taken"
                )


def get_pair(connection: Connection, name: str) -> Pair:
    """The pair of that name; `UsageError` when there is none."""
    pair = find_pair(connection, name)
    if pair is None:
        raise UsageError(
            f"there is no pair {name}: `failback pairs` lists them, `failback register` adds one", code="no-such-pair"
        )
    return pair


def list_pairs(connection: Connection) -> tuple[Pair, ...]:
    """Every pair, by name."""
    return tuple(_pair(row) for row in connection.execute(select(schema.pairs).order_by(schema.pairs.c.name)))


def check_epoch(connection: Connection, name: str, epoch: int) -> None:
    """Raise `Superseded` unless `epoch` is still the pair's newest."""
    newest = connection.execute(select(schema.pairs.c.epoch).where(schema.pairs.c.name == name)).scalar_one_or_none()
    if newest != epoch:
        raise Superseded(
            f"another process has taken over the run of {name} (epoch {newest}, this one had {epoch}): "
            f"this one ends; `failback watch {name}` shows the other",
            pair=name,
        )


def raise_epoch(connection: Connection, name: str, *, above: int = 0) -> int:
    """Take the pair over: the new, highest epoch; higher than `above` too, which an agent has seen."""
    epoch = max(get_pair(connection, name).epoch, above) + 1
    _set(connection, name, epoch=epoch)
    return epoch


def move(connection: Connection, name: str, epoch: int, to: State, *, operator: OperatorCall | None = None) -> Pair:
    """Move the pair to another state; only what the state table lists, only under the newest epoch."""
    check_epoch(connection, name, epoch)
    check_move(get_pair(connection, name), to)
    _set(connection, name, state=to.value, operator=None if operator is None else to_json(operator))
    return get_pair(connection, name)


def set_run(connection: Connection, name: str, epoch: int, run: str) -> None:
    """Name the pair's unfinished run."""
    check_epoch(connection, name, epoch)
    _set(connection, name, run=run)


def set_flag(connection: Connection, name: str, epoch: int, flag: OriginalFlag) -> None:
    """Write the flag of the original's disks."""
    check_epoch(connection, name, epoch)
    _set(connection, name, condition=flag.condition, condition_view=flag.view)


def set_disks(connection: Connection, name: str, epoch: int, disks: tuple[DiskPair, ...]) -> None:
    """Write how the disks of original and replica belong together."""
    check_epoch(connection, name, epoch)
    _set(connection, name, disks=to_json(disks))


def set_newest(connection: Connection, name: str, epoch: int, newest: Newest) -> None:
    """Say which side holds the newest data."""
    check_epoch(connection, name, epoch)
    _set(connection, name, newest=newest.value)


def set_original_autostart(connection: Connection, name: str, epoch: int, before: bool | None) -> None:
    """Remember the original's autostart from before runs took it away; None: it has been given back."""
    check_epoch(connection, name, epoch)
    _set(connection, name, original_autostart=before)


def set_former(connection: Connection, name: str, epoch: int, former: FormerOriginal) -> None:
    """Write what is known of the original that the pair moves away from."""
    check_epoch(connection, name, epoch)
    _set(connection, name, former=to_json(former))


def see_host(connection: Connection, description: HostDescription, at_s: float) -> None:
    """Remember what a host said of itself."""
    connection.execute(delete(schema.hosts).where(schema.hosts.c.name == description.host))
    connection.execute(
        insert(schema.hosts).values(
            name=description.host,
            fingerprint=description.fingerprint,
            software=description.software,
            bulk_port=description.bulk_port,
            seen_s=at_s,
        )
    )


def _set(connection: Connection, name: str, **values: str | int | bool | None) -> None:
    connection.execute(update(schema.pairs).where(schema.pairs.c.name == name).values(**values))


def _columns(pair: Pair) -> dict[str, str | int | bool | None]:
    return {
        "original": to_json(pair.original),
        "replica": to_json(pair.replica),
        "disks": to_json(pair.disks),
        "excluded": to_json(pair.excluded),
        "state": pair.state.value,
        "newest": pair.newest.value,
        "condition": pair.flag.condition,
        "condition_view": pair.flag.view,
        "epoch": pair.epoch,
        "run": pair.run,
        "original_autostart": pair.original_autostart,
        "operator": None if pair.operator is None else to_json(pair.operator),
        "former": None if pair.former is None else to_json(pair.former),
    }


def _pair(row: Row[tuple[object, ...]]) -> Pair:
    return Pair(
        name=row.name,
        original=from_json(row.original, VmRef),
        replica=from_json(row.replica, VmRef),
        disks=from_json(row.disks, tuple[DiskPair, ...]),
        excluded=from_json(row.excluded, tuple[str, ...]),
        state=one_of(State, row.state),
        newest=one_of(Newest, row.newest),
        flag=OriginalFlag(condition=row.condition, view=row.condition_view),
        epoch=row.epoch,
        run=row.run,
        original_autostart=row.original_autostart,
        operator=None if row.operator is None else from_json(row.operator, OperatorCall),
        former=None if row.former is None else from_json(row.former, FormerOriginal),
    )
