"""The simulation is worth something only if it notices: each broken variant of the product must be caught."""

from __future__ import annotations

import pytest

from tests.simulation.story import play
from tests.simulation.variants import VARIANTS, Variant

SEEDS = 150


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_broken_variant_is_caught(variant: Variant) -> None:
    said: list[str] = []
    with variant.installed():
        for seed in range(SEEDS):
            result = play(
                seed, faults=variant.faults, only=variant.only, broken=variant.broken, prepare=variant.prepare
            )
            if result.violation is not None:
                said.append(result.violation)
                if result.violation.startswith(variant.caught_as):
                    return
    pytest.fail(f"not caught within {SEEDS} seeds; seen instead: {said}")
