"""Figures from small inputs: their data, and what is not drawn."""

from __future__ import annotations

from raycomplete.report import plots


def test_the_compliance_map_leaves_what_was_not_drawn_blank() -> None:
    steps = [
        {"step": step, "depth_bins": [[1, 4], [5, 8]], "depth_compliance": values}
        for step, values in ((1, [1.0, None]), (2, [0.5, 0.25]))
    ]
    drawn = plots.compliance_heat_map(steps)
    assert drawn is not None
    assert drawn.rows == [["step", "1-4", "5-8"], [1, 1.0, None], [2, 0.5, 0.25]]
    assert plots.compliance_heat_map([{"step": 1, "depth_bins": [[1, 4]]}]) is None
