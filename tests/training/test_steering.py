"""The rules that steer a run, on planted measurements: which weight moves which way, and which step is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycomplete.config.training import ValidationConfig
from raycomplete.training.validation import STEERED, Steering, StepMeasurement, violation

CONFIG = ValidationConfig(kl_budget=0.1)
ALL = dict.fromkeys(STEERED, 1.0)


def found(
    step: int = 1,
    opening: int = 0,
    depth: int = 0,
    refusals: int = 0,
    kl: float = 0.01,
    in_reach: float = 0.5,
    changed: int | None = None,
) -> StepMeasurement:
    """A measurement of ten harmful prompts at depths 0 and 8, and ten harmless ones: one of them is allowed."""
    changed = abs(refusals) if changed is None else changed
    return StepMeasurement(step, ((0, opening, 10), (8, depth, 10)), refusals, 10, kl, in_reach, changed, 0.25)


def after(measured: Sequence[StepMeasurement], weights: dict[str, float] | None = None, **config: Any) -> Steering:
    """A steering that has seen these."""
    steering = Steering(CONFIG.model_copy(update=config), ALL if weights is None else weights)
    for item in measured:
        steering.update(item)
    return steering


def test_broken_kl_raises_the_anchor_and_lowers_push_forward_alone() -> None:
    factors = after([found(kl=0.15)]).factors
    assert factors["anchor"] == pytest.approx(math.exp(0.3 * 0.5)), "by the share that is above the budget"
    assert factors["push_forward"] == pytest.approx(math.exp(-0.3 * 0.5))
    assert factors["opening"] == 1.0, "it is not what costs KL"


def test_over_refusal_lowers_the_opening_too() -> None:
    factors = after([found(refusals=4)]).factors
    assert factors["anchor"] > 1
    assert factors["push_forward"] < 1
    assert factors["opening"] == factors["push_forward"]


@pytest.mark.parametrize(
    ("refusals", "changed", "broken"), [(4, 4, 1.0), (4, 6, 4 - 6**0.5 - 1), (4, 9, 0.0), (2, 2, 0.0)]
)
def test_over_refusal_counts_beyond_what_chance_changes(refusals: int, changed: int, broken: float) -> None:
    """The net change of nine answers, each up or down by a coin's toss, has a standard deviation of three."""
    assert violation(CONFIG, found(refusals=refusals, changed=changed)) == pytest.approx(broken)


def test_compliance_at_depth_that_stays_raises_push_forward_and_at_depth_0_the_opening() -> None:
    assert after([found(depth=4)] * 2).factors == {"anchor": 1.0, "opening": 1.0, "push_forward": math.exp(0.3)}
    assert after([found(opening=4)] * 2).factors == {"anchor": 1.0, "opening": math.exp(0.3), "push_forward": 1.0}


@pytest.mark.parametrize("refusals", [[(0, 6), (0, 6), (4, 0)], [(-6, 6), (4, 0)]])
def test_a_budget_that_is_broken_now_counts_whatever_was_before(refusals: list[tuple[int, int]]) -> None:
    """Chance is taken off over-refusal, so that a measurement without any is far below 0."""
    measured = [found(depth=8, refusals=net, changed=changed) for net, changed in refusals]
    before, now = after(measured[:-1]).factors, after(measured).factors
    assert now["push_forward"] < before["push_forward"]
    assert now["anchor"] > before["anchor"]


def test_within_the_budgets_what_was_lowered_returns_to_the_run_file_and_no_further() -> None:
    strict = [found(refusals=9, kl=1.0)] * 2
    low = after(strict).factors
    assert low["push_forward"] == low["opening"] == pytest.approx(math.exp(-0.6))
    factors = [after([*strict, *[found(kl=0.0)] * count]).factors["push_forward"] for count in (1, 2, 30)]
    assert factors == [pytest.approx(math.exp(-0.3)), 1.0, 1.0], "as fast as it fell"


@given(
    st.lists(
        st.builds(
            found,
            opening=st.integers(0, 10),
            depth=st.integers(0, 10),
            refusals=st.integers(-10, 10),
            kl=st.floats(0, 100),
        ),
        max_size=30,
    )
)
def test_factors_stay_within_their_bounds(measured: list[StepMeasurement]) -> None:
    factors = after(measured).factors
    assert 1.0 <= factors["anchor"] <= 4.0
    assert all(0.25 <= factors[name] <= 4.0 for name in STEERED)


@pytest.mark.parametrize("weights", [{"anchor": 1.0, "recovery": 1.0}, {"anchor": 1.0, "opening": 0.0}, {"nll": 1.0}])
def test_terms_that_a_method_lacks_are_skipped(weights: dict[str, float]) -> None:
    steering = after([found(kl=9.0, refusals=9), *[found(depth=9, opening=9)] * 3], weights)
    assert set(steering.factors) == {"anchor"} & set(weights)
    assert steering.best_step == 1


def kept(*measured: StepMeasurement) -> StepMeasurement:
    best = after(measured).best
    assert best is not None
    return best


def test_among_equally_safe_steps_the_tail_decides_before_the_kl_within_the_budgets_alone() -> None:
    low, high = found(2, kl=0.05, in_reach=0.1), found(1, kl=0.01, in_reach=0.4)
    assert kept(high, low).step == 2
    assert kept(low, found(3, depth=1, in_reach=0.0)).step == 2, "whoever still complies is no safer"
    assert kept(low, found(3, kl=0.11, in_reach=0.0)).step == 2, "a budget is a budget"
    broken = found(4, refusals=4, kl=0.05, in_reach=0.4), found(5, refusals=4, kl=0.06, in_reach=0.0)
    assert kept(*broken).step == 4
    assert "base's words in reach of an attacker 0.100" in after([high, low]).describe_choice()


def test_where_no_step_meets_the_budgets_the_least_violation_is_kept_and_said() -> None:
    measured = [found(1, kl=0.5), found(2, kl=0.12, depth=9), found(3, kl=0.11, refusals=4)]
    steering = after(measured)
    assert steering.best_step == 2
    text = steering.describe_choice()
    assert text.startswith("No measured step met the budgets on held-back prompts; step 2 breaks them least")
    assert "compliance 0.450 (n = 20)" in text
    kept_now = after([*measured, found(4, depth=10)])
    assert kept_now.best_step == 4, "any step within the budgets is better"
    assert kept_now.describe_choice().startswith("Step 4 is kept")


def test_a_kl_that_is_no_number_exceeds_every_budget() -> None:
    steering = after([found(step=10, kl=math.nan), found(step=20)])
    assert steering.best_step == 20
    assert after([found(kl=math.nan)]).factors["anchor"] > 1
    assert all(math.isfinite(factor) for factor in steering.factors.values())


def test_patience_counts_measurements_without_a_better_one() -> None:
    measured = [found(1), found(2, kl=0.02), found(3, kl=0.02)]
    assert not after(measured).is_over, "0 never ends training"
    assert after(measured, patience=2).is_over
    assert not after([*measured, found(4, kl=0.005)], patience=2).is_over


def test_a_resumed_controller_goes_on() -> None:
    measured = [found(1, depth=5), found(2, depth=5, kl=0.15), found(3, refusals=3), found(4, depth=2)]
    saved = json.loads(json.dumps(after(measured[:2]).state_dict()))
    resumed = Steering(CONFIG, ALL)
    resumed.load_state_dict(saved)
    whole = after(measured)
    for item in measured[2:]:
        resumed.update(item)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.factors == whole.factors != ALL
    assert resumed.best == whole.best


def test_a_lost_best_checkpoint_is_looked_for_again() -> None:
    """Else a run that was about to end would end with the weights of its last step, which were not the best."""
    steering = after([found(1), found(2, kl=0.9)], patience=1)
    assert steering.is_over
    steering.forget_best()
    assert not steering.is_over
    steering.update(found(3, depth=9, kl=0.9))
    assert steering.best_step == 3
