"""Base-favored sets and the position profile."""

from __future__ import annotations

import math

import pytest
import torch

from raycomplete.core import (
    Head,
    base_favored_mask,
    base_favored_mass,
    deficit,
    forward_kl,
    profile_rows,
    trained_depth,
)
from raycomplete.errors import NotFiniteError


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_log_probs(seed: int, rows: int = 50, vocab_size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64).log_softmax(dim=-1)


ALIGNED = log_probs([0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25])
BASE = log_probs([0.1, 0.5, 0.1, 0.3], [0.0, 0.5, 0.25, 0.25])


def test_mask_needs_more_than_aligned_and_at_least_tau():
    assert base_favored_mask(ALIGNED, BASE, 0.0).tolist() == [[False, True, False, True], [False, True, False, False]]
    assert base_favored_mask(ALIGNED, BASE, 0.4).tolist() == [[False, True, False, False], [False, True, False, False]]
    assert not base_favored_mask(ALIGNED, BASE, 0.6).any()


def test_tau_itself_counts():
    assert base_favored_mask(torch.zeros(1, 4).log_softmax(-1) - 1, torch.zeros(1, 4).log_softmax(-1), 0.25).all()


def test_mass():
    assert base_favored_mass(ALIGNED, BASE, 0.0).tolist() == pytest.approx([0.8, 0.5])
    assert base_favored_mass(ALIGNED, BASE, 0.4).tolist() == pytest.approx([0.5, 0.5])


def test_trained_depth_by_hand():
    first = 0.7 * math.log(7) + 0.2 * math.log(0.4)
    depth = trained_depth(ALIGNED, BASE)
    assert depth[0].item() == pytest.approx(first)
    assert depth[1].item() == math.inf  # base excludes a token that aligned allows


def test_deficit():
    assert deficit(torch.tensor([0.0, 1.0, math.inf, -1e-9]), 0.5).tolist() == pytest.approx([1, math.exp(-2), 0, 1])


def test_formulas_on_random_rows():
    aligned, base = random_log_probs(1), random_log_probs(2)
    p_a, p_b = aligned.exp(), base.exp()
    mask = (p_b > p_a) & (p_b >= 0.05)
    assert torch.equal(base_favored_mask(aligned, base, 0.05), mask)
    assert torch.allclose(base_favored_mass(aligned, base, 0.05), torch.where(mask, p_b, 0.0).sum(-1))
    assert torch.allclose(trained_depth(aligned, base), (p_a * (p_a / p_b).log()).sum(-1))
    assert (trained_depth(aligned, base) > 0).all()


def test_kl_ignores_tokens_that_p_excludes_and_keeps_gradients_finite():
    for q in (log_probs([0.5, 0.5, 0.0]), log_probs([0.25, 0.25, 0.5])):
        p = log_probs([0.5, 0.5, 0.0]).requires_grad_()
        q = q.requires_grad_()
        kl = forward_kl(p, q)
        assert kl.item() == pytest.approx(math.log(0.5 / q.exp()[0, 0].item()), abs=1e-12)
        kl.sum().backward()
        assert p.grad.isfinite().all()
        assert q.grad.isfinite().all()
        assert q.grad[0].tolist() == pytest.approx([-0.5, -0.5, 0.0])


def test_equal_models_have_no_mass_no_depth_and_full_deficit():
    same = random_log_probs(3)
    assert not base_favored_mass(same, same, 0.0).any()
    assert not trained_depth(same, same).any()
    assert (deficit(trained_depth(same, same), 0.5) == 1).all()


def heads_and_hidden(rows: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(rows, 4),
        Head(normal(13, 4), normal(13), softcap=2.0),
        normal(rows, 3),
        Head(normal(13, 3), scale=0.5),
    )


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_profile_is_the_formulas_row_by_row_whatever_the_chunk(chunk_tokens):
    policy_NH, policy_head, base_NH, base_head = heads_and_hidden()
    log_policy, log_base = policy_head.logits(policy_NH).log_softmax(-1), base_head.logits(base_NH).log_softmax(-1)
    profile = profile_rows(policy_NH, policy_head, base_NH, base_head, 0.05, 0.7, chunk_tokens)
    assert torch.allclose(profile.mass_N, base_favored_mass(log_policy, log_base, 0.05), rtol=1e-12)
    assert torch.allclose(profile.kl_N, trained_depth(log_policy, log_base), rtol=1e-12)
    assert torch.allclose(profile.deficit_N, torch.exp(-profile.kl_N / 0.7), rtol=1e-12)


def test_profile_of_base_itself():
    policy_NH, policy_head, _, _ = heads_and_hidden(dtype=torch.bfloat16)
    profile = profile_rows(policy_NH, policy_head, policy_NH, policy_head, 0.0, 0.5, 4)
    assert not profile.mass_N.any()
    assert not profile.kl_N.any()
    assert (profile.deficit_N == 1).all()
    assert profile.kl_N.dtype == torch.float32


def test_profile_takes_no_gradient_and_no_rows():
    policy_NH, policy_head, base_NH, base_head = heads_and_hidden(rows=0)
    profile = profile_rows(policy_NH.requires_grad_(), policy_head, base_NH, base_head, 0.05, 0.7, 4)
    assert profile.mass_N.shape == profile.kl_N.shape == profile.deficit_N.shape == (0,)
    assert not profile.kl_N.requires_grad


def test_profile_refuses_what_does_not_fit():
    policy_NH, policy_head, base_NH, base_head = heads_and_hidden()
    with pytest.raises(ValueError, match=r"base hidden must be \[11, 3\]"):
        profile_rows(policy_NH, policy_head, base_NH[:5], base_head, 0.05, 0.7, 4)
    with pytest.raises(ValueError, match="policy 13, base 12"):
        profile_rows(policy_NH, policy_head, base_NH, base_head.rows(12), 0.05, 0.7, 4)
    with pytest.raises(ValueError, match="chunk_tokens"):
        profile_rows(policy_NH, policy_head, base_NH, base_head, 0.05, 0.7, 0)
    policy_NH[3, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"policy hidden .* row 3"):
        profile_rows(policy_NH, policy_head, base_NH, base_head, 0.05, 0.7, 4)
