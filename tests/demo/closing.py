"""The closing table, from the report that `failback --json history PAIR --report` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.cli import human
from tests.demo.proofs import Proof


def closing_table(report: Mapping[str, Any], proofs: Sequence[Proof]) -> RenderableType:
    """Per disk and pass what was compared, changed and sent and on which rung of evidence; per step the seconds;
    the downtime; and every proof."""
    return Group(_disks(report), "", _steps(report), "", _proofs(proofs))


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _disks(report: Mapping[str, Any]) -> Table:
    numbers = ("Compared", "Changed", "Sent")
    table = _table("Disks", "Disk", "Pass", *numbers, "Evidence", right=numbers)
    for line in report["disks"]:
        table.add_row(
            line["original"],
            human.step(line["pass_name"]),
            human.size(line["compared_bytes"]),
            human.size(line["changed_bytes"]),
            human.size(line["sent_bytes"]),
            human.rung(line["rung"]),
        )
    return table


def _steps(report: Mapping[str, Any]) -> Table:
    table = _table("Steps", "Step", "Took", right=("Took",))
    for line in report["steps"]:
        name = human.step(line["step"])
        table.add_row(f"taken back: {name}" if line["undone"] else name, human.duration(line["elapsed_s"]))
    table.add_row(
        Text("Downtime of the switchover", style="bold"), Text(human.duration(report["downtime_s"]), style="bold")
    )
    return table


def _proofs(proofs: Sequence[Proof]) -> Table:
    table = _table("Proofs", "", "Claim", "Seen")
    for proof in proofs:
        mark = Text("ok", style="green") if proof.holds else Text("!!", style="bold red")
        table.add_row(mark, proof.claim, proof.seen)
    return table
