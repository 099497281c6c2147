"""Fixed numbers of statsmodels 0.15.0: `proportion_confint(..., method="wilson")`."""

import pytest

from raycomplete.evaluation.statistics import mean_over_depths, mean_over_trials, wilson, worst_of_trials

STATSMODELS = [
    (0, 50, 0.95, 0.0, 0.07134759913335874),
    (3, 100, 0.95, 0.01025452402403891, 0.08451936429052763),
    (7, 13, 0.95, 0.29143795714506004, 0.7679393219046169),
    (50, 100, 0.95, 0.4038315303659956, 0.5961684696340044),
    (99, 100, 0.95, 0.9455138038212946, 0.9982325679358593),
    (279, 292, 0.95, 0.9253301160388809, 0.973800117635431),
    (24, 33, 0.9, 0.5862528685961468, 0.8338499655557727),
    (1, 400, 0.99, 0.00029358173877255984, 0.02094142950398739),
]


@pytest.mark.parametrize(("successes", "n", "confidence", "low", "high"), STATSMODELS)
def test_wilson_agrees_with_statsmodels(successes: int, n: int, confidence: float, low: float, high: float) -> None:
    rate = wilson(successes, n, confidence)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-12)


def test_trials_in_a_table_are_depths() -> None:
    """Four behaviours, three trials each: the same as a curve of three depths, turned around."""
    trials = [[True, True, True], [True, False, False], [False, False, False], [True, True, False]]
    table = [list(column) for column in zip(*trials, strict=True)]
    assert mean_over_trials(trials) == mean_over_depths(table)


def test_every_behaviour_weighs_the_same() -> None:
    """One behaviour with a hundred failed trials does not outweigh one with a single success."""
    rate = mean_over_trials([[False] * 100, [True]])
    assert (rate.rate, rate.n) == (0.5, 2)
    assert worst_of_trials([[False] * 100, [True]]) == wilson(1, 2)


def test_worst_of_n_is_no_lower_than_the_mean() -> None:
    trials = [[True, False], [False, False], [False, True]]
    assert mean_over_trials(trials).rate == pytest.approx(1 / 3)
    assert worst_of_trials(trials).rate == pytest.approx(2 / 3)


def test_behaviours_without_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        mean_over_trials([[True], []])
    assert mean_over_trials([]) == wilson(0, 0)
