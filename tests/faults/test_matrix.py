"""The short part of the matrix on real hosts: kills around every step of the switchover, other faults somewhere."""

from __future__ import annotations

import pytest

from tests.faults import matrix
from tests.faults.cells import Cell, Outcome
from tests.faults.rig import Rig

pytestmark = [pytest.mark.real, pytest.mark.root]


@pytest.mark.parametrize("cell", matrix.short(), ids=lambda cell: cell.name)
def test_the_pair_comes_to_rest_with_every_byte_on_one_side(rig: Rig, cell: Cell) -> None:
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> bool:
        outcomes.append(outcome)
        return True

    matrix.go_through(rig, [cell], tell)
    (outcome,) = outcomes
    assert not outcome.error, f"{outcome.error}\n{'; '.join(outcome.happened)}\nthe user saw: {outcome.saw}"
