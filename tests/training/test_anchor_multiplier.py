"""The anchor's multiplier: follows its budget within bounds, and a resumed run goes on where it was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycomplete.config import ConstraintConfig
from raycomplete.runtime.errors import NotFiniteError
from raycomplete.training.anchor_multiplier import AnchorMultiplier

CONFIG = ConstraintConfig(kl_budget=0.02, rate=0.1, max_weight=4.0)


def after(divergences: list[float], config: ConstraintConfig = CONFIG, start: float = 1.0) -> AnchorMultiplier:
    multiplier = AnchorMultiplier(config, start)
    for divergence in divergences:
        multiplier.update(divergence)
    return multiplier


def test_one_update_is_the_formula() -> None:
    assert after([0.03]).weight == pytest.approx(math.exp(0.1 * 0.5))
    running = 0.8 * 0.03 + 0.2 * 0.05
    assert after([0.03, 0.05]).weight == pytest.approx(math.exp(0.1 * 0.5) * math.exp(0.1 * (running / 0.02 - 1)))


def test_a_wild_step_moves_it_no_further_than_three_budgets_would() -> None:
    assert after([100.0]).weight == pytest.approx(after([0.06]).weight)


@given(st.lists(st.floats(0, 10), max_size=30), st.floats(0.1, 8))
def test_it_stays_within_its_bounds(divergences: list[float], start: float) -> None:
    assert start <= after(divergences, start=start).weight <= max(CONFIG.max_weight, start)


def test_it_grows_above_budget_and_falls_back_below() -> None:
    grown = after([0.06] * 10)
    assert grown.weight > after([0.06] * 5).weight > 1.0
    assert after([0.06] * 10 + [0.0] * 40).weight == 1.0
    assert after([0.06] * 10, start=2.0).factor == pytest.approx(after([0.06] * 10, start=2.0).weight / 2.0)


def test_without_a_budget_it_stays() -> None:
    assert after([5.0] * 10, ConstraintConfig(), start=1.5).weight == 1.5


def test_a_resumed_run_goes_on() -> None:
    saved = after([0.05, 0.01]).state_dict()
    resumed = AnchorMultiplier(CONFIG, 1.0)
    resumed.load_state_dict(saved)
    resumed.update(0.04)
    assert resumed.weight == after([0.05, 0.01, 0.04]).weight


def test_nan_is_refused_with_a_remedy() -> None:
    with pytest.raises(NotFiniteError, match="anchor divergence"):
        AnchorMultiplier(CONFIG, 1.0).update(math.nan)
