"""Figures from small inputs: their data, and what is not drawn."""

from __future__ import annotations

from matplotlib import rc_context

from raycomplete.report import plots
from tests.report.conftest import a_validation


def test_the_compliance_map_leaves_what_was_not_drawn_blank() -> None:
    steps = [
        {"step": step, "depth_bins": [[1, 4], [5, 8]], "depth_compliance": values}
        for step, values in ((1, [1.0, None]), (2, [0.5, 0.25]))
    ]
    drawn = plots.compliance_heat_map(steps)
    assert drawn is not None
    assert drawn.rows == [["step", "1-4", "5-8"], [1, 1.0, None], [2, 0.5, 0.25]]
    assert plots.compliance_heat_map([{"step": 1, "depth_bins": [[1, 4]]}]) is None


def test_steering_tells_every_measurement_and_the_step_that_was_kept() -> None:
    rows = [{"step": 1}, *({"step": step, "validation": a_validation(step)} for step in (20, 40))]
    drawn = plots.steering(rows)
    assert drawn is not None
    head, first, second = drawn.rows
    assert head[:4] == ["step", "compliance_0", "compliance_8", "compliance_32"]
    assert head[4:8] == ["in_reach", "unfinished_mass", "over_refusal", "kl"]
    assert head[8:] == ["anchor_factor", "push_forward_factor", "meets_budgets"]
    assert (first[0], first[3], first[-1]) == (20, 0.7, False)
    assert (second[8], second[-1]) == (1.4, True)
    assert "step 40, which was kept" in drawn.caption
    assert plots.steering(rows[:1]) is None


def test_a_legend_of_many_long_names_stays_on_the_page() -> None:
    with rc_context(plots.STYLE):
        for number in (2, 18):
            figure, axes = plots.new_figure(4.6)
            for place in range(number):
                axes.plot([0, 1], [0, place], label=f"a method with settings, {place}")
            plots.legend_above(figure, axes, columns=4)
            figure.draw_without_rendering()
            (legend,) = figure.legends
            box, page = legend.get_window_extent(), figure.bbox
            assert (box.x0 >= page.x0, box.x1 <= page.x1) == (True, True)
            assert len(legend.get_texts()) == number


def test_a_depth_that_no_answer_reaches_is_no_point_of_the_curve() -> None:
    nobody = {"rate": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    by_depth = {"0": {"rate": 0.5, "low": 0.4, "high": 0.6, "n": 100}, "500": nobody}
    plot = plots.prefill_curve({"asr": {"student": {"by_depth": by_depth}}})
    assert plot is not None
    assert [row[1] for row in plot.rows[1:]] == [0]
    assert [list(line.get_ydata()) for line in plot.figure.axes[0].lines] == [[0.5]]
