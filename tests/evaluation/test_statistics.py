import numpy as np
import pytest
from scipy.stats import binomtest

from raycomplete.evaluation.statistics import mean_over_depths, wilson


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
