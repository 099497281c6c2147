import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from raycomplete.evaluation.statistics import (
    mean_over_depths,
    mean_over_trials,
    paired_bootstrap,
    wilson,
    worst_of_trials,
)

# Fixed numbers of statsmodels 0.15.0: `proportion_confint(..., method="wilson")`.
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
SHARES = st.dictionaries(st.text(max_size=4), st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 100), (3, 100), (50, 100), (99, 100), (100, 100), (7, 13)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    expected = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    rate = wilson(successes, n, confidence)
    assert rate.rate == successes / n
    assert rate.n == n
    assert rate.low == pytest.approx(expected.low, abs=1e-12)
    assert rate.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_closed_form_at_zero() -> None:
    """At 0 of n the upper end is z^2 / (n + z^2)."""
    z2 = 1.959963984540054**2
    assert wilson(0, 50).high == pytest.approx(z2 / (50 + z2), rel=1e-12)
    assert wilson(0, 50).low == 0.0


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson(0, 0).to_json() == {"rate": 0.0, "n": 0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_wilson_refuses_impossible_confidence() -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=1.0)


def test_one_depth_is_wilson() -> None:
    row = [True] * 3 + [False] * 17
    mean, single = mean_over_depths([row]), wilson(3, 20)
    assert mean.rate == single.rate
    assert mean.n == 20
    # The sample variance divides by N - 1, so the effective number is N - 1, held at N.
    assert (mean.low, mean.high) == pytest.approx((single.low, single.high), abs=1e-12)


def test_repeated_depths_add_no_knowledge() -> None:
    row = [True] * 30 + [False] * 70
    assert mean_over_depths([row] * 6) == mean_over_depths([row])


def test_mean_at_the_ends_stays_cautious() -> None:
    """All refused at six depths: as wide as 100 prompts at one depth, not as 600 trials."""
    assert mean_over_depths([[False] * 100] * 6) == wilson(0, 100)
    assert mean_over_depths([[True] * 100] * 6) == wilson(100, 100)


def test_interval_covers_under_dependence() -> None:
    """Simulated prompts of differing difficulty: near 95 % of the intervals hold the truth, naive ones do not."""
    generator = np.random.default_rng(0)
    num_prompts, num_depths, truth = 80, 6, 0.3
    covered = naive = 0
    for _ in range(400):
        difficulty = generator.beta(0.3, 0.7, size=num_prompts)  # mean 0.3, most prompts all or nothing
        table = generator.random((num_depths, num_prompts)) < difficulty
        rate = mean_over_depths(table.tolist())
        pooled = wilson(int(table.sum()), table.size)
        covered += rate.low <= truth <= rate.high
        naive += pooled.low <= truth <= pooled.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.75


def test_mean_refuses_ragged_tables() -> None:
    for table in ([], [[True], [True, False]]):
        with pytest.raises(ValueError, match="same prompts"):
            mean_over_depths(table)
    assert mean_over_depths([[], []]) == wilson(0, 0)


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


@settings(deadline=None)
@given(first=SHARES, second=SHARES)
def test_difference_lies_in_its_interval_and_turns_around(first: dict[str, float], second: dict[str, float]) -> None:
    common = first.keys() & second.keys()
    if not common:
        with pytest.raises(ValueError, match="both models"):
            paired_bootstrap(first, second)
        return
    there, back = (paired_bootstrap(*pair, resamples=200) for pair in ((first, second), (second, first)))
    assert there.n == len(common)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)


def test_pairing_leaves_out_what_is_hard_for_both() -> None:
    """Behaviours differ a lot, the models by 0.1 on each: the interval has no width, an unpaired one would."""
    first = {f"b{n}": 0.1 + 0.9 * (n % 2) for n in range(50)}
    second = {name: share - 0.1 for name, share in first.items()}
    found = paired_bootstrap(first, second)
    assert (found.difference, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_difference_interval_covers_the_truth() -> None:
    """Simulated models: 0.6 and 0.4 on behaviours of shared difficulty; near 95 % of the intervals hold 0.2."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        hard = generator.random(80)
        first = {str(n): float(value < 0.6) for n, value in enumerate(hard)}
        second = {str(n): float(value < 0.4) for n, value in enumerate(hard)}
        found = paired_bootstrap(first, second, resamples=400)
        covered += found.low <= 0.2 <= found.high
    assert 0.9 <= covered / 300 <= 0.99


def test_the_same_input_gives_the_same_interval() -> None:
    first, second = {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}
    found = paired_bootstrap(first, second)
    assert found == paired_bootstrap(first, second)
    assert (found.n, found.resamples) == (3, 10_000)
    assert found.to_json()["low"] == 0.0
