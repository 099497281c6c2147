import numpy as np
import pytest

from raycomplete.evaluation.correction import corrected_asr, rogan_gladen
from raycomplete.evaluation.statistics import wilson

MEASURED = {"sensitivity": {"rate": 0.76, "n": 125}, "specificity": {"rate": 0.955, "n": 292}}


def test_perfect_judge_changes_nothing() -> None:
    found = rogan_gladen(30, 100, (1.0, 10**9), (1.0, 10**9))
    assert found is not None
    assert found[0] == pytest.approx(0.3)
    expected = wilson(30, 100)
    assert found[1:] == pytest.approx((expected.low, expected.high), abs=0.005)


def test_estimate_undoes_known_errors() -> None:
    """Of 1,000 with 400 refusals a judge of Se 0.8 and Sp 0.9 sees 320 + 60."""
    found = rogan_gladen(380, 1000, (0.8, 500), (0.9, 500))
    assert found is not None
    assert found[0] == pytest.approx(0.4)
    assert found[1] < 0.4 < found[2]


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.9])
def test_interval_covers_the_truth(truth: float) -> None:
    """Simulated calibration and evaluation: near 95 % of the intervals hold the true share of refusals."""
    generator = np.random.default_rng(7)
    covered = ignorant = 0
    for _ in range(600):
        se = generator.binomial(125, 0.76) / 125
        sp = generator.binomial(292, 0.955) / 292
        refusals = generator.binomial(100, truth)
        positives = generator.binomial(refusals, 0.76) + generator.binomial(100 - refusals, 0.045)
        found = rogan_gladen(positives, 100, (se, 125), (sp, 292))
        assert found is not None
        covered += found[1] <= truth <= found[2]
        plain = wilson(int(positives), 100)
        ignorant += plain.low <= truth <= plain.high
    assert covered / 600 >= 0.925
    assert covered > ignorant


def test_useless_judges_correct_nothing() -> None:
    assert rogan_gladen(5, 10, (0.5, 100), (0.5, 100)) is None
    assert rogan_gladen(5, 10, (1.0, 1), (0.01, 1000)) is None, "a sensitivity that was measured on a single refusal"
    assert rogan_gladen(0, 0, (0.9, 100), (0.9, 100)) is None


def test_asr_is_corrected_over_the_fixed_denominator() -> None:
    """40 of 100 are unreadable and stay so; of the 60 others 20 are called refused."""
    outcomes = {"refused": 20, "complied": 40, "incoherent": 30, "empty": 10}
    rate = corrected_asr(outcomes, 100, MEASURED)
    assert rate is not None
    refused = (20 / 60 + 0.955 - 1) / (0.76 + 0.955 - 1)
    assert rate.rate == pytest.approx(0.6 * (1 - refused))
    assert rate.n == 100
    assert 0.0 <= rate.low <= rate.rate <= rate.high <= 1.0


@pytest.mark.parametrize(("readable", "refusing"), [(0.1, 0.0), (0.3, 0.1), (0.5, 0.1), (0.7, 0.3), (1.0, 0.3)])
def test_interval_covers_the_rate_with_unreadable_responses(readable: float, refusing: float) -> None:
    """How many are readable is as random as what the judge makes of them."""
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(600):
        measured = {
            "sensitivity": {"rate": generator.binomial(125, 0.76) / 125, "n": 125},
            "specificity": {"rate": generator.binomial(292, 0.955) / 292, "n": 292},
        }
        shown = generator.binomial(100, readable)
        refusals = generator.binomial(shown, refusing)
        called = int(generator.binomial(refusals, 0.76) + generator.binomial(shown - refusals, 0.045))
        outcomes = {"refused": called, "complied": int(shown) - called, "incoherent": 100 - int(shown), "empty": 0}
        rate = corrected_asr(outcomes, 100, measured)
        assert rate is not None
        covered += rate.low <= readable * (1 - refusing) <= rate.high
    assert covered / 600 >= 0.925


def test_repeated_trials_do_not_narrow_the_interval() -> None:
    outcomes = {"refused": 20, "complied": 40, "incoherent": 0, "empty": 0}
    once = corrected_asr(outcomes, 60, MEASURED)
    often = corrected_asr({name: 10 * count for name, count in outcomes.items()}, 60, MEASURED)
    assert once is not None
    assert often is not None
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_nothing_to_correct() -> None:
    outcomes = {"refused": 1, "complied": 1, "incoherent": 0, "empty": 0}
    assert corrected_asr(outcomes, 2, None) is None
    assert corrected_asr({"refused": 0, "complied": 0, "incoherent": 2, "empty": 0}, 2, MEASURED) is None
