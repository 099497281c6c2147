import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import t as student_t

from raycomplete.evaluation.statistics import (
    difference_over_runs,
    mean_over_runs,
    mean_over_trials,
    paired_bootstrap,
    paired_reduction,
    wilson,
)
from tests.evaluation.simulation import beta_binomial, coverage

COVERAGE_CASES = [
    (0.005, 0.9, 200),
    (0.01, 0.0, 100),
    (0.01, 0.7, 100),
    (0.01, 0.9, 100),
    (0.01, 0.9, 200),
    (0.03, 0.7, 50),
    (0.03, 0.9, 100),
    (0.1, 0.7, 50),
    (0.3, 0.9, 80),
]
TABLES = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=2, max_size=30)
SHARES = st.dictionaries(st.text(max_size=4), st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 100), (3, 100), (50, 100), (99, 100), (100, 100), (7, 13)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    rate = wilson(successes, n)
    assert rate.rate == successes / n
    assert rate.n == n
    assert rate.low == pytest.approx(expected.low, abs=1e-12)
    assert rate.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson(0, 0).to_json() == {"rate": 0.0, "n": 0, "low": 0.0, "high": 1.0}


@settings(deadline=None)
@given(table=TABLES)
def test_mean_agrees_with_its_formula(table: list[list[bool]]) -> None:
    """The definition in plain numbers, prompt by prompt."""
    shares = [sum(trials) / len(trials) for trials in table]
    n, p = len(shares), sum(shares) / len(shares)
    found = mean_over_trials(table)
    assert (found.rate, found.n) == (pytest.approx(p), n)
    if p in (0.0, 1.0):
        assert found == wilson(round(p * n), n)
        return
    likeness = sum((share - p) ** 2 for share in shares) / (n - 1) / (p * (1 - p))
    likeness = min(max(likeness, sum(1 / len(trials) for trials in table) / n), 1.0)
    telling = min(sum(any(trials) for trials in table), sum(not all(trials) for trials in table))
    trials = n * (telling + 2) / (telling * likeness + 2)
    z2 = 1.959963984540054**2
    middle, half = p + z2 / 2 / trials, math.sqrt(z2 * (p * (1 - p) / trials + z2 / 4 / trials**2))
    assert found.low == pytest.approx((middle - half) / (1 + z2 / trials), abs=1e-12)
    assert found.high == pytest.approx((middle + half) / (1 + z2 / trials), abs=1e-12)
    assert n <= trials <= sum(map(len, table)) + 1e-9, "never wider than one trial a prompt"


@pytest.mark.parametrize(("rate", "correlation", "num_prompts"), COVERAGE_CASES)
def test_interval_of_the_mean_holds_the_truth(rate: float, correlation: float, num_prompts: int) -> None:
    """Beta-binomial prompts, six depths: as often as it says, and at least so often where few trials succeed."""
    tables = beta_binomial(np.random.default_rng(0), rate, correlation, num_prompts, num_depths=6, repeats=1500)
    assert 0.93 <= coverage(tables, 6, rate, mean_over_trials) <= (0.975 if correlation else 1.0)


@settings(deadline=None)
@given(first=SHARES, second=SHARES)
def test_difference_lies_in_its_interval_and_turns_around(first: dict[str, float], second: dict[str, float]) -> None:
    common = first.keys() & second.keys()
    if not common:
        with pytest.raises(ValueError, match="both models"):
            paired_bootstrap(first, second)
        return
    there, back = (paired_bootstrap(*pair, resamples=100) for pair in ((first, second), (second, first)))
    assert there["n"] == len(common)
    assert there["difference"] == pytest.approx(-back["difference"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]), abs=1e-9)


def test_models_that_refuse_everything_are_not_proved_equal() -> None:
    """100 prompts without a success: the difference may be what a handful of prompts would make."""
    nothing = {str(n): 0.0 for n in range(100)}
    found = paired_bootstrap(nothing, nothing)
    assert found["difference"] == 0.0
    assert -0.04 < found["low"] < -0.02
    assert 0.02 < found["high"] < 0.04


@pytest.mark.parametrize(
    ("only_first", "only_second", "num_prompts"),
    [(0.02, 0.005, 50), (0.05, 0.0, 50), (0.1, 0.02, 100), (0.02, 0.9, 50)],
)
def test_difference_interval_covers_the_truth(only_first: float, only_second: float, num_prompts: int) -> None:
    """Prompts at which only one of two models succeeds: 95 % of the intervals hold the true difference, or more."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        drawn = generator.random(num_prompts)
        first = {str(n): float(value < only_first) for n, value in enumerate(drawn)}
        second = {str(n): float(value > 1 - only_second) for n, value in enumerate(drawn)}
        found = paired_bootstrap(first, second, resamples=400)
        covered += found["low"] <= only_first - only_second <= found["high"]
    assert covered / 400 >= 0.93


def test_the_bootstrap_agrees_with_scipy() -> None:
    """On shares with nothing near an end, against scipy's own paired percentile bootstrap of the same N + 2 prompts."""
    generator = np.random.default_rng(3)
    first_N, second_N = generator.uniform(0.3, 0.9, 60), generator.uniform(0.0, 0.6, 60)
    found = paired_bootstrap(*({str(n): float(x) for n, x in enumerate(shares)} for shares in (first_N, second_N)))
    pair = np.append(first_N, [1.0, 0.0]), np.append(second_N, [0.0, 1.0])
    expected = scipy_bootstrap(
        pair, lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile", rng=4, vectorized=True
    ).confidence_interval
    assert found["difference"] == pytest.approx(float(np.mean(first_N - second_N)), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=4e-3)


def test_reduction_has_an_interval() -> None:
    """94 of 100 prompts fall to the attack before and 2 after: reduced by 97.9 %, and by no less than nine tenths."""
    before = {str(n): float(n < 94) for n in range(100)}
    after = {str(n): float(n < 2) for n in range(100)}
    found = paired_reduction(after, before)
    assert found is not None
    assert found["reduction"] == pytest.approx(1 - 2 / 94)
    assert 0.9 < found["low"] < found["reduction"] < found["high"] <= 1.0
    assert found == paired_reduction(after, before)
    assert paired_reduction(before, dict.fromkeys(before, 0.0)) is None, "nothing to reduce"
    assert paired_reduction({"a": 0.0}, {"a": 1.0}) is None, "too few to say"


def test_mean_over_runs_agrees_with_its_formula() -> None:
    """Three runs of 50 prompts in plain numbers."""
    generator = np.random.default_rng(2)
    table = (generator.random((3, 50)) < np.asarray([[0.2], [0.3], [0.55]])).astype(float)
    found = mean_over_runs([{str(n): value for n, value in enumerate(row)} for row in table.tolist()])
    rows, p = [sum(row) / 50 for row in table.tolist()], sum(map(sum, table.tolist())) / 150
    columns = [sum(column) / 3 for column in zip(*table.tolist(), strict=True)]
    likeness = max(sum((share - p) ** 2 for share in columns) / 49 / (p * (1 - p)), 1 / 3)
    telling = min(sum(share > 0 for share in columns), sum(share < 1 for share in columns))
    of_prompts = (telling * likeness + 2) / (telling + 2) * p * (1 - p) / 50
    of_runs = sum((row - p) ** 2 for row in rows) / 2 / 3
    df = (of_prompts + of_runs) ** 2 / (of_prompts**2 / 49 + of_runs**2 / 2)
    z2, trials = float(student_t.ppf(0.975, df)) ** 2, p * (1 - p) / (of_prompts + of_runs)
    middle, half = p + z2 / 2 / trials, math.sqrt(z2 * (p * (1 - p) / trials + z2 / 4 / trials**2))
    expected = [(middle + sign * half) / (1 + z2 / trials) for sign in (-1, 1)]
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=1e-9)
    assert (found["min"], found["max"]) == pytest.approx((min(rows), max(rows)))


def test_runs_that_differ_widen_the_interval() -> None:
    """The same mean rate, from runs alike and from runs of .0 and .4."""
    alike = [{str(n): float(n % 5 == run) for n in range(100)} for run in range(2)]
    apart = [{str(n): float(n % 5 < count) for n in range(100)} for count in (0, 2)]
    narrow, wide = mean_over_runs(alike), mean_over_runs(apart)
    assert narrow["rate"] == pytest.approx(wide["rate"]) == pytest.approx(0.2)
    assert wide["high"] - wide["low"] > 3 * (narrow["high"] - narrow["low"])
    change = difference_over_runs(apart, alike)
    assert change["difference"] == pytest.approx(0.0)
    assert (change["min"], change["max"]) == pytest.approx((-0.2, 0.2))
    assert (change["low"], change["high"]) == (-1.0, 1.0), "two runs that disagree say nothing"


def test_interval_over_runs_holds_the_truth() -> None:
    """Three runs of 100 prompts at six depths, with difficulty by prompt and luck by seed."""
    generator, held = np.random.default_rng(5), 0
    truth = float(np.mean(1 / (1 + np.exp(3.5 - np.hypot(2.0, 0.5) * generator.standard_normal(1_000_000)))))
    for _ in range(300):
        chance = 1 / (1 + np.exp(3.5 - 2.0 * generator.standard_normal(100) - 0.5 * generator.standard_normal((3, 1))))
        shares = generator.binomial(6, chance) / 6
        found = mean_over_runs([{str(n): value for n, value in enumerate(row)} for row in shares.tolist()], trials=6)
        held += found["low"] <= truth <= found["high"]
    assert held / 300 >= 0.92
