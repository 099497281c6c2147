"""The walk against a materialised float64 computation, the statistics against scipy, the depth against a plain fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from raycomplete.core import Head
from raycomplete.core.base_favored import trained_depth
from raycomplete.core.diagnostics import (
    METRICS,
    DiagnosisSettings,
    PositionStatistics,
    diagnose_rows,
    position_bands,
    t_quantile,
)
from raycomplete.errors import NotFiniteError

NUM_ROWS, VOCAB = 29, 17
REFUSALS = (3, 5)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Head, torch.Tensor, Head]:
    """Hidden states and heads of a policy and of base, of different width."""
    policy = Head(normal(1, VOCAB, 6).to(dtype), normal(2, VOCAB).to(dtype), softcap=3.0)
    base = Head(normal(3, VOCAB, 4).to(dtype), scale=0.7)
    return normal(4, NUM_ROWS, 6).to(dtype), policy, normal(5, NUM_ROWS, 4).to(dtype), base


def materialised(policy_NH, policy_head, base_NH, base_head, config: DiagnosisSettings) -> torch.Tensor:
    """The definitions, written out over whole [N, V] tables."""
    p_NV = torch.softmax(policy_head.logits(policy_NH).double(), dim=-1)
    b_NV = torch.softmax(base_head.logits(base_NH).double(), dim=-1)
    favored_NV = (b_NV >= config.tau) & (b_NV > p_NV * math.exp(config.margin))
    kl_N = (p_NV * (p_NV / b_NV).log()).sum(-1)
    return torch.stack(
        [
            (b_NV * favored_NV).sum(-1),
            favored_NV.sum(-1).double(),
            kl_N,
            torch.exp(-kl_N / config.kappa),
            (p_NV.argmax(-1) == b_NV.argmax(-1)).double(),
            p_NV[:, list(REFUSALS)].sum(-1),
        ],
        dim=1,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, NUM_ROWS, 1000])
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_the_walk_equals_the_materialised_computation(chunk_tokens: int, tau: float) -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    config = DiagnosisSettings(tau=tau, margin=0.1, kappa=0.7, chunk_tokens=chunk_tokens)
    found = diagnose_rows({"aligned": (policy_NH, policy_head)}, base_NH, base_head, REFUSALS, config)["aligned"]
    expected_NM = materialised(policy_NH, policy_head, base_NH, base_head, config)
    assert torch.allclose(found.values_NM, expected_NM, rtol=1e-11, atol=1e-13)
    assert expected_NM[:, METRICS.index("base_favored_count")].sum() > 0
    # The tokens behind the mass, each with its row and both probabilities.
    b_NV = torch.softmax(base_head.logits(base_NH), dim=-1)
    p_NV = torch.softmax(policy_head.logits(policy_NH), dim=-1)
    assert torch.allclose(found.base_probability_K, b_NV[found.row_K, found.token_K], rtol=1e-12)
    assert torch.allclose(found.policy_probability_K, p_NV[found.row_K, found.token_K], rtol=1e-12)
    mass_N = torch.zeros(NUM_ROWS, dtype=torch.float64).index_add(0, found.row_K, found.base_probability_K)
    assert torch.allclose(mass_N, expected_NM[:, 0], rtol=1e-12)


def test_several_policies_are_walked_as_one_by_one() -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    other_NH = normal(9, NUM_ROWS, 6)
    config = DiagnosisSettings(chunk_tokens=5)
    both = {"aligned": (policy_NH, policy_head), "student": (other_NH, policy_head)}
    found = diagnose_rows(both, base_NH, base_head, REFUSALS, config)
    for name, policy in both.items():
        alone = diagnose_rows({name: policy}, base_NH, base_head, REFUSALS, config)[name]
        assert torch.equal(found[name].values_NM, alone.values_NM)
        assert torch.equal(found[name].token_K, alone.token_K)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_policy_that_is_base_has_no_mass_no_kl_and_full_deficit(dtype: torch.dtype) -> None:
    _, _, base_NH, base_head = models(dtype)
    config = DiagnosisSettings(tau=0.0, margin=0.0, chunk_tokens=4)
    found = diagnose_rows({"aligned": (base_NH, base_head)}, base_NH, base_head, (), config)["aligned"]
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0]).to(found.values_NM.dtype)
    assert torch.equal(found.values_NM, expected.expand(NUM_ROWS, -1))
    assert len(found.token_K) == 0


def test_a_change_planted_at_positions_0_to_9_shows_there_and_nowhere_else() -> None:
    _, _, base_NH, base_head = models()
    policy_NH = base_NH.clone()
    policy_NH[:10] += normal(7, 10, 4)
    config = DiagnosisSettings(margin=0.0, chunk_tokens=6)
    rows = diagnose_rows({"aligned": (policy_NH, base_head)}, base_NH, base_head, (), config)["aligned"]
    statistics = PositionStatistics(replicates=0)
    statistics.add(rows.values_NM)
    mean_TM = statistics.mean_TM()
    mass_T, kl_T, deficit_T = (mean_TM[:, METRICS.index(n)] for n in ("base_favored_mass", "kl_to_base", "deficit"))
    assert (mass_T[:10] > 0.01).all()
    assert (kl_T[:10] > 0.01).all()
    assert (deficit_T[:10] < 0.99).all()
    assert not mass_T[10:].any()
    assert not kl_T[10:].any()
    assert (deficit_T[10:] == 1).all()


def test_the_margin_removes_rounding_and_keeps_what_is_real() -> None:
    """Half of the mass counts between two equal models that differ by rounding, none above the margin."""
    _, _, base_NH, base_head = models()
    policy_NH = base_NH + 1e-3 * normal(8, NUM_ROWS, 4)
    policy_NH[0] = -base_NH[0]
    masses = {}
    for margin in (0.0, 0.05):
        config = DiagnosisSettings(margin=margin)
        rows = diagnose_rows({"aligned": (policy_NH, base_head)}, base_NH, base_head, (), config)
        masses[margin] = rows["aligned"].values_NM[:, 0]
    assert 0.2 < masses[0.0][1:].mean() < 0.8
    assert not masses[0.05][1:].any()
    assert masses[0.05][0] == pytest.approx(masses[0.0][0].item(), abs=0.05)


def test_no_rows_and_wrong_inputs() -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    config = DiagnosisSettings()
    empty = diagnose_rows({"aligned": (policy_NH[:0], policy_head)}, base_NH[:0], base_head, REFUSALS, config)
    assert empty["aligned"].values_NM.shape == (0, len(METRICS))
    with pytest.raises(ValueError, match=r"aligned hidden must be \[29, 6\]"):
        diagnose_rows({"aligned": (policy_NH[:3], policy_head)}, base_NH, base_head, (), config)
    with pytest.raises(ValueError, match="base 17, aligned 12"):
        diagnose_rows({"aligned": (policy_NH, policy_head.rows(12))}, base_NH, base_head, (), config)
    with pytest.raises(ValueError, match="chunk_tokens"):
        DiagnosisSettings(chunk_tokens=0)
    base_NH[4, 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"base hidden .* row 4"):
        diagnose_rows({"aligned": (policy_NH, policy_head)}, base_NH, base_head, (), config)


@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_tokens_that_both_exclude_count_for_nothing(tau: float) -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    masked = [replace(head, bias_V=torch.zeros(VOCAB).double(), softcap=None) for head in (policy_head, base_head)]
    for head in masked:
        head.bias_V[-1] = -torch.inf
    config = DiagnosisSettings(tau=tau, chunk_tokens=8)
    found, expected = (
        diagnose_rows({"aligned": (policy_NH, first)}, base_NH, second, REFUSALS, config)["aligned"]
        for first, second in (masked, [head.rows(VOCAB - 1) for head in masked])
    )
    assert torch.allclose(found.values_NM, expected.values_NM, rtol=1e-12)
    assert torch.equal(found.token_K, expected.token_K)


def test_tokens_that_one_model_excludes() -> None:
    hidden_NH, head, _, base_head = models()
    bias_V = torch.zeros(VOCAB).double()
    bias_V[4] = -torch.inf
    masked, plain = replace(head, bias_V=bias_V, softcap=None), replace(base_head, weight_VH=head.weight_VH)
    config = DiagnosisSettings(chunk_tokens=8)
    rows = diagnose_rows({"aligned": (hidden_NH, masked)}, hidden_NH, plain, REFUSALS, config)["aligned"]
    logs = [item.logits(hidden_NH).log_softmax(-1) for item in (masked, plain)]
    assert torch.allclose(rows.values_NM[:, METRICS.index("kl_to_base")], trained_depth(*logs), rtol=1e-11)
    with pytest.raises(NotFiniteError, match=f"KL of aligned to base .* {NUM_ROWS} of {NUM_ROWS} rows"):
        diagnose_rows({"aligned": (hidden_NH, plain)}, hidden_NH, masked, REFUSALS, config)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 1000])
def test_t_quantile(degrees: int) -> None:
    assert t_quantile(torch.tensor(float(degrees))).item() == pytest.approx(student_t.ppf(0.975, degrees), rel=2e-3)


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
            assert torch.allclose(half_M, expected_M, rtol=2e-3, atol=1e-6)


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


def test_bands_cover_every_position_once() -> None:
    assert position_bands(1) == [(0, 0)]
    assert position_bands(20) == [(0, 0), (1, 3), (4, 7), (8, 15), (16, 19)]
    for size in (2, 4, 5, 100, 2048):
        covered = [position for low, high in position_bands(size) for position in range(low, high + 1)]
        assert covered == list(range(size))
