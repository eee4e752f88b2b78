"""The matrix leaves nothing out that the coordinator's tables name, and its page says what the results say."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import coordinator
from coordinator.steps import Step
from tests.faults import matrix, report
from tests.faults.__main__ import whole_lines
from tests.faults.boundaries import OF_ANOTHER_PAIR, STEPS, Way, boundaries
from tests.faults.cells import Cell, Outcome
from tests.faults.faults import FAULTS


def _all_kinds(kind: Any) -> set[Any]:
    below = {deeper for child in kind.__subclasses__() for deeper in _all_kinds(child)}
    return below | {kind}


def _kinds_of_coordinator() -> set[Any]:
    """Every step of the product that can be carried out."""
    for module in pkgutil.iter_modules(coordinator.__path__):
        importlib.import_module(f"coordinator.{module.name}")
    kinds = {kind for kind in _all_kinds(Step) if kind.__module__.startswith("coordinator.")}
    return {kind for kind in kinds if not kind.__abstractmethods__ and hasattr(kind, "name")}


def test_every_step_of_the_coordinator_has_a_row_but_those_of_another_kind_of_pair() -> None:
    known = {type(step) for steps in STEPS.values() for step in steps}
    assert {kind.name for kind in _kinds_of_coordinator() - known} == OF_ANOTHER_PAIR


def test_everything_that_can_be_taken_back_is_struck_while_it_is() -> None:
    taken_back = {step.name for step in STEPS[Way.RUN] if step.undo_sentence}
    assert {place.step for place in boundaries(Way.UNDO)} == taken_back


@pytest.mark.parametrize("victim", ["coordinator", "source-agent", "target-agent"])
def test_each_process_dies_on_both_sides_of_every_step_of_a_run(victim: str) -> None:
    struck = {cell.boundary for cell in matrix.cells() if cell.fault.name == f"kill-{victim}"}
    assert struck >= set(boundaries(Way.RUN))


def test_the_coordinator_dies_on_both_sides_of_every_step_on_every_way() -> None:
    struck = {cell.boundary for cell in matrix.cells() if cell.fault.name == "kill-coordinator"}
    assert struck == set(boundaries())


def test_there_are_as_many_cells_as_were_promised_each_once_and_every_fault_is_in_the_short_part() -> None:
    names = [cell.name for cell in matrix.cells()]
    assert len(names) >= 150
    assert len(names) == len(set(names))
    assert {cell.fault.name for cell in matrix.short()} == {fault.name for fault in FAULTS}


def _line(cell: Cell, **more: Any) -> dict[str, Any]:
    line = report.line_of(
        Outcome(cell, happened=["`start` ended with 1", "Failover"], saw="web7 rolled back", seconds=2)
    )
    return {**line, **more}


def test_the_page_is_in_the_order_of_the_matrix_and_names_what_is_red_or_missing() -> None:
    first, second, third = matrix.cells()[:3]
    lines = [_line(second), _line(first, error="a | b")]
    page = report.page(lines, (first, second, third), "Written today.")
    assert "2 cells, 1 green, 1 red; 1 was not come to." in page
    rows = [line for line in page.splitlines() if line.startswith(("| before", "| after"))]
    assert rows == [
        "| before `survey` | **RED: a \\| b** `start` ended with 1 → Failover | web rolled back | 2.0 |",
        "| after `survey` | `start` ended with 1 → Failover | web rolled back | 2.0 |",
    ]


def test_the_page_has_nothing_in_it_that_differs_from_run_to_run() -> None:
    cell = matrix.cells()[0]
    outcome = Outcome(cell, saw="web12 (rdeadbeef01-2.1) at 10.77.0.2 port 9860 in /tmp/fb-1-abc/dr/x\nthere")
    assert report.line_of(outcome)["saw"] == "web (RUN) at ADDRESS port 9860 in …/dr/x there"


def test_a_run_that_was_killed_amid_a_line_goes_on_with_the_whole_ones() -> None:
    assert whole_lines('{"name": "one", "error": ""}\n{"name": "two", "er') == [{"name": "one", "error": ""}]


def test_a_broken_line_amid_the_results_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        whole_lines('{"name": "one", \n{"name": "two", "error": ""}\n')
