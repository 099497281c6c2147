"""`make bench`: the formulas of `raycomplete plan` beside measured runs."""

from __future__ import annotations

import pytest

from tests.benchmarks.plan.cases import CASES, Case
from tests.benchmarks.plan.measured import measured_points
from tests.benchmarks.plan.recorded import recorded_points


def test_recorded_points_are_reproduced_where_they_were_fitted() -> None:
    fitted = [point for point in recorded_points() if point.fitted]
    assert fitted
    assert all(point.error < 0.02 for point in fitted), "a constant no longer belongs to its measurement"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_part_of_a_step_is_measured(case: Case) -> None:
    points = measured_points(case, engines=True)
    assert len(points) == 6
    assert all(point.measured > 0 for point in points)
