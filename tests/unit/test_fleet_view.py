"""The table of a plan, on narrow and wide terminals and in a pipe."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from coordinator.cli.fleet_view import LinePlan, LivePlan, note_of, picture_table, summary
from coordinator.cli.output import Output
from coordinator.cli.plan_file import load_plan
from coordinator.fleet import Place, Turn, TurnKind
from coordinator.fleet_standing import Looker, Picture, Row
from coordinator.progress import Progress
from coordinator.runs import Coordinator
from tests.unit.fleet_house import Fleet

LONG = "the replica did not power off within 60 s: look at its guest, or use --shutdown-policy force, then start again"


@pytest.fixture
def picture(memory_folder: Path) -> Picture:
    """A pair at each of four places."""
    fleet = Fleet(memory_folder, "db1", "a-database-with-a-long-name", "app1", "web1")
    fleet.plan(
        '[[group]]\nname = "databases"\npairs = ["db1", "a-database-with-a-long-name"]\n'
        '[[group]]\nname = "applications-of-the-site"\npairs = ["app1", "web1"]\n'
    )

    async def look(coordinator: Coordinator) -> Picture:
        return await Looker(coordinator, load_plan(fleet.file)).look()

    rows = fleet.session().run(look).rows
    done = Progress(
        run="r", step="pass:1", at_s=0, elapsed_s=1, disks=(), total_bytes=8 << 30, done_bytes=3 << 30, zero_bytes=0,
        changed_bytes=0, wire_bytes=0, saved_bytes=0, rate_bytes_s=120 << 20, eta_s=45.0,
    )  # fmt: skip
    copying = replace(rows[1], status=replace(rows[1].status, step="pass:1", progress=done))
    delayed = replace(rows[2], turn=Turn(kind=TurnKind.DELAYED, sentence="delay of 90 s after databases", left_s=80.0))
    return Picture(
        rows=(
            _at(rows[0], Place.HOME),
            _at(copying, Place.COPYING),
            _at(delayed, Place.WAITING),
            _at(rows[3], Place.FAILED, LONG),
        )
    )


def _at(row: Row, place: Place, sentence: str = "") -> Row:
    return replace(row, standing=replace(row.standing, place=place, sentence=sentence))


def _drawn(picture: Picture, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(picture_table(picture, width))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_each_pair_is_one_line_that_fits(picture: Picture, width: int) -> None:
    lines = _drawn(picture, width)
    assert len(lines) == 1 + len(picture.rows)
    assert all(len(line) <= width for line in lines)
    for line, state in zip(lines[1:], ("home", "copying", "waiting", "failed"), strict=True):
        assert state in line
    assert "37%" in lines[2]


def test_a_wide_table_has_speed_and_whole_sentences(picture: Picture) -> None:
    lines = _drawn(picture, 200)
    assert "120 MiB/s" in lines[2]
    assert "a-database-with-a-long-name" in lines[2]
    assert "1 min 20 s left, delay of 90 s after databases" in lines[3]
    assert LONG[:90] in lines[4]
    assert "120 MiB/s" not in note_of(picture.rows[1])


def test_the_sums_name_every_place_that_has_somebody(picture: Picture) -> None:
    assert summary(picture) == "4 pairs: 1 copying, 1 waiting, 1 home, 1 failed"


def test_in_a_pipe_each_change_is_a_line_and_progress_one_now_and_then(picture: Picture) -> None:
    stream, now = io.StringIO(), [0.0]
    output = Output(as_json=False, no_color=True, stdout=stream, stderr=io.StringIO())
    view = LinePlan(output, lambda: now[0])
    view.show(picture)
    view.show(picture)
    assert len(stream.getvalue().splitlines()) == 4
    now[0] = 60.0
    view.show(picture)
    view.notice("app1: its turn has come")
    lines = stream.getvalue().splitlines()[4:]
    assert lines == [
        "    a-database-with-a-long-name: 37% pass 1, 45.0 s left, 120 MiB/s",
        f"    {summary(picture)}",
        "  * app1: its turn has come",
    ]


class Terminal(io.StringIO):
    """A stream that people look at."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_on_a_terminal_the_table_moves_and_leaves_nothing_behind_but_notices(
    picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    output = Output(as_json=False, no_color=True, stdout=stream, stderr=io.StringIO())
    with LivePlan(output) as view:
        view.show(picture)
        view.notice("app1: its turn has come")
    assert "app1: its turn has come" in stream.getvalue()
    assert "1 copying" in stream.getvalue()
