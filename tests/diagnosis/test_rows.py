"""The chunked pass against a materialised float64 computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.diagnosis import rows as diagnosis_rows
from raycomplete.diagnosis.rows import METRICS, DiagnosisRows, DiagnosisSettings, Opening, diagnose_rows
from raycomplete.losses import Head
from raycomplete.losses.base_favored import forward_kl
from raycomplete.runtime.errors import NotFiniteError

NUM_ROWS, VOCAB = 29, 17
REFUSALS = (3, 5)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(dtype: torch.dtype = torch.float64, vocab: int = VOCAB) -> tuple[torch.Tensor, Head, torch.Tensor, Head]:
    """Hidden states and heads of a policy and of base, of different width."""
    policy = Head(normal(1, vocab, 6).to(dtype), normal(2, vocab).to(dtype), softcap=3.0)
    base = Head(normal(3, vocab, 4).to(dtype), scale=0.7)
    return normal(4, NUM_ROWS, 6).to(dtype), policy, normal(5, NUM_ROWS, 4).to(dtype), base


def diagnose(
    policies: dict[str, tuple[torch.Tensor, Head]],
    base_NH: torch.Tensor,
    base_head: Head,
    refusal_ids: tuple[int, ...],
    config: DiagnosisSettings,
) -> dict[str, DiagnosisRows]:
    """The pass with a prompt for each row, which the first policy opens as it goes on there."""
    hidden_NH, head = next(iter(policies.values()))
    opening = Opening(hidden_NH.detach(), head, torch.arange(len(hidden_NH)))
    return diagnose_rows(policies, base_NH, base_head, opening, refusal_ids, config)


def materialised(policy_NH, policy_head, base_NH, base_head, config: DiagnosisSettings) -> torch.Tensor:
    """The definitions, written out over whole [N, V] tables, where the policy opens each row as it goes on there."""
    p_NV = torch.softmax(policy_head.logits(policy_NH).double(), dim=-1)
    b_NV = torch.softmax(base_head.logits(base_NH).double(), dim=-1)
    favored_NV = (b_NV >= config.tau) & (b_NV > p_NV * math.exp(config.margin))
    kl_N = (p_NV * (p_NV / b_NV).log()).sum(-1)
    return torch.stack(
        [
            (b_NV * favored_NV).sum(-1),
            favored_NV.sum(-1).double(),
            (p_NV * favored_NV).sum(-1),
            kl_N,
            torch.exp(-kl_N / config.kappa),
            (p_NV.argmax(-1) == b_NV.argmax(-1)).double(),
            p_NV[:, list(REFUSALS)].sum(-1),
        ],
        dim=1,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, NUM_ROWS, 1000])
@pytest.mark.parametrize("vocab", [VOCAB, 64, 200])  # of one short group, one whole one, and several with a short last
@pytest.mark.parametrize("block_rows", [1, 3, 1000])
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_the_pass_equals_the_materialised_computation(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, vocab: int, block_rows: int, tau: float
) -> None:
    monkeypatch.setattr(diagnosis_rows, "_block_rows", lambda *_: block_rows)
    policy_NH, policy_head, base_NH, base_head = models(vocab=vocab)
    config = DiagnosisSettings(tau=tau, margin=0.1, kappa=0.7, chunk_tokens=chunk_tokens)
    found = diagnose({"aligned": (policy_NH, policy_head)}, base_NH, base_head, REFUSALS, config)["aligned"]
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


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_base_favored_tokens_are_told_by_the_opening_of_their_prompt(chunk_tokens: int) -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    aligned_NH, config = normal(9, NUM_ROWS, 6), DiagnosisSettings(tau=0.02, chunk_tokens=chunk_tokens)
    prompt_N = torch.arange(NUM_ROWS).div(7, rounding_mode="floor")
    opening = Opening.of_rows(aligned_NH, policy_head, prompt_N)
    found = diagnose_rows({"student": (policy_NH, policy_head)}, base_NH, base_head, opening, (), config)["student"]
    p_NV, b_NV = policy_head.logits(policy_NH).softmax(-1), base_head.logits(base_NH).softmax(-1)
    a_NV = policy_head.logits(aligned_NH[prompt_N * 7]).softmax(-1)
    favored_NV = (b_NV > a_NV * math.exp(config.margin)) & (b_NV >= config.tau)
    assert torch.allclose(found.column("base_favored_mass"), (b_NV * favored_NV).sum(-1), rtol=1e-11)
    assert torch.allclose(found.column("unfinished_mass"), (p_NV * favored_NV).sum(-1), rtol=1e-11)
    assert found.column("base_favored_count").tolist() == favored_NV.sum(-1).tolist()


def test_several_policies_are_read_as_one_by_one() -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    other_NH = normal(9, NUM_ROWS, 6)
    config = DiagnosisSettings(chunk_tokens=5)
    both = {"aligned": (policy_NH, policy_head), "student": (other_NH, policy_head)}
    opening = Opening(policy_NH[:3], policy_head, torch.arange(NUM_ROWS) // 10)
    found = diagnose_rows(both, base_NH, base_head, opening, REFUSALS, config)
    for name, policy in both.items():
        alone = diagnose_rows({name: policy}, base_NH, base_head, opening, REFUSALS, config)[name]
        assert torch.equal(found[name].values_NM, alone.values_NM)
        assert torch.equal(found[name].token_K, alone.token_K)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_policy_that_is_base_has_no_mass_no_kl_and_full_deficit(dtype: torch.dtype) -> None:
    _, _, base_NH, base_head = models(dtype)
    config = DiagnosisSettings(tau=0.0, chunk_tokens=4)
    found = diagnose({"aligned": (base_NH, base_head)}, base_NH, base_head, (), config)["aligned"]
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]).to(found.values_NM.dtype)
    assert torch.equal(found.values_NM, expected.expand(NUM_ROWS, -1))
    assert len(found.token_K) == 0


def test_no_rows_and_wrong_inputs() -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    config = DiagnosisSettings()
    empty = diagnose({"aligned": (policy_NH[:0], policy_head)}, base_NH[:0], base_head, REFUSALS, config)
    assert empty["aligned"].values_NM.shape == (0, len(METRICS))
    with pytest.raises(ValueError, match=r"aligned hidden must be \[29, 6\]"):
        diagnose({"aligned": (policy_NH[:3], policy_head)}, base_NH, base_head, (), config)
    with pytest.raises(ValueError, match="base 17, opening 12, aligned 12"):
        diagnose({"aligned": (policy_NH, policy_head.rows(12))}, base_NH, base_head, (), config)
    with pytest.raises(ValueError, match="chunk_tokens"):
        diagnose({"aligned": (policy_NH, policy_head)}, base_NH, base_head, (), replace(config, chunk_tokens=0))
    base_NH[4, 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"base hidden .* row 4"):
        diagnose({"aligned": (policy_NH, policy_head)}, base_NH, base_head, (), config)


@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_tokens_that_both_exclude_count_for_nothing(tau: float) -> None:
    policy_NH, policy_head, base_NH, base_head = models()
    masked = [replace(head, bias_V=torch.zeros(VOCAB).double(), softcap=None) for head in (policy_head, base_head)]
    for head in masked:
        head.bias_V[-1] = -torch.inf
    config = DiagnosisSettings(tau=tau, chunk_tokens=8)
    found, expected = (
        diagnose({"aligned": (policy_NH, first)}, base_NH, second, REFUSALS, config)["aligned"]
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
    rows = diagnose({"aligned": (hidden_NH, masked)}, hidden_NH, plain, REFUSALS, config)["aligned"]
    logs = [item.logits(hidden_NH).log_softmax(-1) for item in (masked, plain)]
    assert torch.allclose(rows.values_NM[:, METRICS.index("kl_to_base")], forward_kl(*logs), rtol=1e-11)
    with pytest.raises(NotFiniteError, match=f"KL of aligned to base .* {NUM_ROWS} of {NUM_ROWS} rows"):
        diagnose({"aligned": (hidden_NH, plain)}, hidden_NH, masked, REFUSALS, config)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(2, 200), levels=st.integers(1, 5), tau=st.sampled_from([0.0, 0.004, 0.03]), seed=st.integers(0)
)
def test_the_first_of_equals_and_every_candidate_are_found(vocab: int, levels: int, tau: float, seed: int) -> None:
    """Logits of few levels have many ties, in every group."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    heads = [Head(torch.randint(levels, (vocab, 1), generator=generator).double()) for _ in range(2)]
    ones_NH = torch.ones(1, 1, dtype=torch.float64)
    config = DiagnosisSettings(tau=tau, margin=0.0)
    found = diagnose({"aligned": (ones_NH, heads[0])}, ones_NH, heads[1], (), config)["aligned"]
    policy_V, base_V = (head.weight_VH[:, 0].softmax(0) for head in heads)
    agreement = float(policy_V.argmax() == base_V.argmax())
    assert found.values_NM[0, METRICS.index("agreement")] == agreement
    close_V = ((base_V - policy_V).abs() < 1e-12) | ((base_V - tau).abs() < 1e-12)  # there rounding decides
    expected_V = (base_V > policy_V) & (base_V >= tau)
    listed_V = torch.zeros(vocab, dtype=torch.long).index_add(0, found.token_K, torch.ones_like(found.token_K))
    assert (close_V | (listed_V == expected_V)).all()
    assert (found.token_K.diff() > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_only_the_product_is_rounded_to_bfloat16(offset: float) -> None:
    """Logits of 30 and more, as real heads give, or of 1000: within 1e-5 of float64 on the same logits."""
    policy_NH, base_NH = (normal(seed, 40, 64).bfloat16() for seed in (11, 12))
    base_NH = (policy_NH + 0.2 * base_NH).bfloat16()
    bias_V = torch.full((3000,), offset)
    head = Head((normal(13, 3000, 64) * 1.2).bfloat16(), bias_V, scale=0.9, softcap=None if offset else 60.0)
    config = DiagnosisSettings(tau=0.001, margin=0.0)
    found = diagnose({"aligned": (policy_NH, head)}, base_NH, head, REFUSALS, config)["aligned"]
    assert head.logits(policy_NH).max() > 30
    assert found.values_NM.dtype == torch.float32
    expected_NM = materialised(policy_NH, head, base_NH, head, config)
    assert torch.allclose(found.values_NM.double(), expected_NM, rtol=1e-5, atol=1e-5)


def test_the_mass_of_a_sure_model_is_not_rounded_away() -> None:
    """Both all but certain of one token: log p is some -1e-4, which logits of 30 in float32 barely resolve."""
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(400, 1000, generator=generator)
    logits_NV[:, 7] = 20.0
    identity = Head(torch.eye(1000), torch.full((1000,), 10.0))
    policy_NV = logits_NV + 0.1 * torch.randn(400, 1000, generator=generator)
    config = DiagnosisSettings(tau=0.01, margin=0.0)
    found = diagnose({"aligned": (policy_NV, identity)}, logits_NV, identity, (), config)["aligned"]
    p_NV, b_NV = (identity.logits(rows).double().softmax(-1) for rows in (policy_NV, logits_NV))
    mass_N = (b_NV * ((b_NV > p_NV) & (b_NV >= 0.01))).sum(-1)
    assert 1e-6 < float((1 - b_NV[:, 7]).median()) < 1e-5
    assert 0.3 < float(mass_N.mean()) < 0.7
    assert float(((found.column("base_favored_mass") - mass_N).abs() > 0.5).double().mean()) < 0.08
