"""The statistics against scipy, the completion depth against a plain fit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from raycomplete.diagnosis.statistics import PositionStatistics


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=9), seed=st.integers(0, 2**16))
def test_statistics_equal_those_of_all_values_at_once(lengths: list[int], seed: int) -> None:
    prompts = [normal(seed + index, length, 3) for index, length in enumerate(lengths)]
    statistics = PositionStatistics(3, bootstrap_column=0, replicates=3)
    for values_TM in prompts:
        statistics.add(values_TM)
    assert statistics.num_prompts == len(lengths)
    for position in range(max(lengths)):
        values_PM = torch.stack([values_TM[position] for values_TM in prompts if len(values_TM) > position])
        count = len(values_PM)
        assert statistics.count_T[position] == count
        assert torch.allclose(statistics.mean_TM()[position], values_PM.mean(0), atol=1e-12)
        half_M = statistics.half_width_TM()[position]
        if count == 1:
            assert half_M.isinf().all()
        else:
            error_M = values_PM.std(0) / count**0.5
            expected_M = error_M * student_t.ppf(0.975, count - 1)
            assert torch.allclose(half_M, expected_M, rtol=1e-6, atol=1e-6)


def monotone_fit(values: list[float], weights: list[float]) -> list[float]:
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


def with_deficits(*prompts: list[float], replicates: int = 0) -> PositionStatistics:
    statistics = PositionStatistics(1, bootstrap_column=0, replicates=replicates)
    for deficits in prompts:
        statistics.add(torch.tensor(deficits, dtype=torch.float64)[:, None])
    return statistics


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=15), min_size=1, max_size=5),
    threshold=st.sampled_from([0.31, 0.5, 0.77]),
)
def test_completion_depth_is_where_the_monotone_fit_crosses(prompts: list[list[float]], threshold: float) -> None:
    statistics = with_deficits(*prompts)
    fit = monotone_fit(statistics.mean_TM()[:, 0].tolist(), statistics.count_T.tolist())
    expected = next((position for position, value in enumerate(fit) if value > threshold), None)
    close = any(abs(value - threshold) < 1e-9 for value in fit)  # there rounding decides, and either is right
    assert close or statistics.completion_depth(threshold).depth == expected


def test_completion_depth_by_hand() -> None:
    assert with_deficits([0.0, 1.0, 1.0, 1.0]).completion_depth(0.5).depth == 1
    assert with_deficits([0.1, 0.9, 0.2, 0.2, 0.9, 1.0]).completion_depth(0.5).depth == 4  # one spike decides nothing
    assert with_deficits([1.0, 1.0]).completion_depth(0.5).depth == 0
    never = with_deficits([0.1, 0.2, 0.3], replicates=50).completion_depth(0.5)
    assert (never.depth, never.low, never.high, never.halves) == (None, None, None, (None, None))


def test_the_interval_of_the_depth_covers_the_spread_between_prompts() -> None:
    """Prompts end at 2 or at 6 alike often: the halves and the bootstrap must say so."""
    shallow, deep = [0.0] * 2 + [1.0] * 8, [0.0] * 6 + [1.0] * 4
    mixed = with_deficits(*[shallow, deep] * 10, replicates=200).completion_depth(0.5)
    assert mixed.halves == (2, 6)
    assert mixed.low == 2
    assert mixed.high == 6
    alike = with_deficits(*[shallow] * 20, replicates=200).completion_depth(0.5)
    assert (alike.depth, alike.low, alike.high, alike.halves) == (2, 2, 2, (2, 2))


def test_the_bootstrap_depends_on_the_seed_only() -> None:
    steps = torch.arange(40)[:, None]
    prompts = [(steps > 3 + seed).double() for seed in range(30)]  # each exceeds the threshold elsewhere
    found = []
    for seed in (0, 0, 1):
        statistics = PositionStatistics(1, bootstrap_column=0, replicates=5, seed=seed)
        for values_TM in prompts:
            statistics.add(values_TM)
        found.append(statistics.completion_depth(0.5))
    assert found[0] == found[1]
    assert (found[0].low, found[0].high) != (found[2].low, found[2].high)
