"""Which depths are drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from raycomplete.methods.registry import DepthConfig
from raycomplete.training.step_plan import DepthSampler


def sampler(seed: int = 0, *, min: int = 1, max: int = 64, schedule: str = "adaptive", **constants) -> DepthSampler:
    config = type("Depths", (DepthConfig,), constants)
    return DepthSampler(config(min=min, max=max, schedule=schedule), seed)


@given(low=st.integers(1, 40), span=st.integers(0, 80), bins=st.integers(1, 20))
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_bins_partition_the_depths(low, span, bins):
    subject = sampler(min=low, max=low + span, bins=bins)
    assert subject.num_bins == min(bins, span + 1)
    sizes = [last - first + 1 for first, last in subject.bin_ranges]
    assert sum(sizes) == span + 1
    assert max(sizes) - min(sizes) <= 1
    for index, (first, last) in enumerate(subject.bin_ranges):
        assert subject.bin_of(first) == subject.bin_of(last) == index
    assert subject.probabilities() == pytest.approx(np.array(sizes) / (span + 1))


def test_draws_follow_the_measured_loss():
    subject = sampler(min=1, max=40, bins=4, uniform_floor=0.2)
    subject.update([1.0, 2.0, 3.0, 24.0], [1, 1, 1, 4])  # means 1, 2, 3, 6
    expected = 0.2 * 0.25 + 0.8 * np.array([1, 2, 3, 6]) / 12
    assert subject.probabilities() == pytest.approx(expected)
    depths = np.array(subject.draw(step=5, count=20_000))
    counts = np.bincount((depths - 1) // 10, minlength=4)
    assert stats.chisquare(counts, 20_000 * expected).pvalue > 1e-4
    assert stats.chisquare(np.bincount(depths)[31:]).pvalue > 1e-4  # uniform within a bin


def test_running_mean_decays_and_unseen_bins_keep_theirs():
    subject = sampler(min=1, max=4, bins=2, uniform_floor=0.0, decay=0.75)
    subject.update([2.0, 2.0], [1, 1])
    subject.update([12.0, 99.0], [2, 0])
    assert subject.state_dict()["running_loss"] == pytest.approx([0.75 * 2 + 0.25 * 6, 2.0])


def test_uniform_where_everything_is_solved_or_the_schedule_says_so():
    solved = sampler(min=1, max=8, bins=2)
    solved.update([0.0, -1e-9], [3, 3])  # rounding below 0 counts as 0
    assert solved.probabilities() == pytest.approx([0.5, 0.5])
    uniform = sampler(min=1, max=8, bins=2, schedule="uniform")
    uniform.update([0.0, 5.0], [3, 3])
    assert uniform.probabilities() == pytest.approx([0.5, 0.5])


def test_draws_depend_on_seed_step_and_state_only():
    first, second = sampler(seed=1), sampler(seed=1)
    first.draw(step=0, count=100)  # a draw leaves no trace
    assert first.draw(step=7, count=50) == second.draw(step=7, count=50)
    assert first.draw(step=7, count=50) != first.draw(step=8, count=50)
    assert first.draw(step=7, count=50) != sampler(seed=2).draw(step=7, count=50)
    second.update(np.arange(8.0), np.ones(8))
    assert first.draw(step=7, count=50) != second.draw(step=7, count=50)
    assert first.draw(step=7, count=0) == []


def test_state_survives_json():
    saved = sampler(seed=4)
    saved.update(np.arange(8.0), [1, 1, 1, 1, 1, 1, 1, 0])
    resumed = sampler(seed=4)
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert resumed.draw(step=9, count=64) == saved.draw(step=9, count=64)
    for subject in (saved, resumed):
        subject.update(np.full(8, 0.1), np.ones(8))
    assert resumed.state_dict() == saved.state_dict()
