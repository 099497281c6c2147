"""The statistics against scipy, the completion depth against a plain fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from raycomplete.diagnosis.statistics import (
    CompletionDepth,
    completion_depth,
    counts,
    intervals,
    mask,
    padded,
    position_bands,
)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=9), seed=st.integers(0, 2**16))
def test_means_and_intervals_equal_those_of_scipy(lengths: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    prompts = [5 + draw.normal(size=(length, 3)) for length in lengths]
    values_PTM = padded(prompts)
    columns = intervals(values_PTM)
    for position in range(max(lengths)):
        there_PM = np.stack([values_TM[position] for values_TM in prompts if len(values_TM) > position])
        count = len(there_PM)
        assert counts(values_PTM)[position] == count
        for column, found in enumerate(columns):
            mean = there_PM[:, column].mean()
            assert found["mean"][position] == pytest.approx(mean)
            if count == 1:
                assert found["low"][position] is found["high"][position] is None
            else:
                half = there_PM[:, column].std(ddof=1) / count**0.5 * student_t.ppf(0.975, count - 1)
                assert found["low"][position] == pytest.approx(max(mean - half, 0))
                assert found["high"][position] == pytest.approx(mean + half)


def monotone_fit(values: list[float], weights: list[int]) -> list[float]:
    """Pool adjacent violators, as in a textbook."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            later, earlier = blocks.pop(), blocks.pop()
            total = later[1] + earlier[1]
            pooled = (later[0] * later[1] + earlier[0] * earlier[1]) / total
            blocks.append([pooled, total, later[2] + earlier[2]])
    return [block[0] for block in blocks for _ in range(int(block[2]))]


def depth_of(*prompts: list[float], threshold: float = 0.5, replicates: int = 0) -> CompletionDepth:
    values_PTM = padded([np.asarray(deficits)[:, None] for deficits in prompts])
    return completion_depth(values_PTM[:, :, 0], threshold, replicates)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=15), min_size=1, max_size=5),
    threshold=st.sampled_from([0.31, 0.5, 0.77]),
)
def test_completion_depth_is_where_the_monotone_fit_crosses(prompts: list[list[float]], threshold: float) -> None:
    values_PTM = padded([np.asarray(deficits)[:, None] for deficits in prompts])
    fit = monotone_fit(intervals(values_PTM)[0]["mean"], counts(values_PTM))
    expected = next((position for position, value in enumerate(fit) if value > threshold), None)
    close = any(abs(value - threshold) < 1e-9 for value in fit)  # there rounding decides, and either is right
    assert close or depth_of(*prompts, threshold=threshold).depth == expected


def test_completion_depth_by_hand() -> None:
    assert depth_of([0.0, 1.0, 1.0, 1.0]).depth == 1
    assert depth_of([0.1, 0.9, 0.2, 0.2, 0.9, 1.0]).depth == 4  # one spike decides nothing
    assert depth_of([1.0, 1.0]).depth == 0
    never = depth_of([0.1, 0.2, 0.3], replicates=50)
    assert (never.depth, never.low, never.high, never.halves) == (None, None, None, (None, None))


def test_the_interval_of_the_depth_covers_the_spread_between_prompts() -> None:
    """Prompts end at 2 or at 6 alike often: the halves and the bootstrap must say so."""
    shallow, deep = [0.0] * 2 + [1.0] * 8, [0.0] * 6 + [1.0] * 4
    mixed = depth_of(*[shallow, deep] * 10, replicates=200)
    assert (mixed.low, mixed.high, mixed.halves) == (2, 6, (2, 6))
    assert mixed == depth_of(*[shallow, deep] * 10, replicates=200), "the bootstrap is reproducible"
    alike = depth_of(*[shallow] * 20, replicates=200)
    assert (alike.depth, alike.low, alike.high, alike.halves) == (2, 2, 2, (2, 2))


def test_bands_cover_every_position_once() -> None:
    assert position_bands(20) == [(0, 0), (1, 3), (4, 7), (8, 15), (16, 19)]
    for size in (1, 2, 4, 5, 100, 2048):
        covered = [position for low, high in position_bands(size) for position in range(low, high + 1)]
        assert covered == list(range(size))


def test_masked_text_keeps_its_shape_only() -> None:
    assert mask("Mix 2 parts, then stir!") == "••• • •••••, •••• ••••!"
