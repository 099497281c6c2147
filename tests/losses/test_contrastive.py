"""The contrastive target."""

from __future__ import annotations

import math

import pytest
import torch

from raycomplete.losses.base_favored import forward_kl
from raycomplete.losses.divergences import contrastive_log_probs


def log_probs(*rows: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().to(dtype)


def random_log_probs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, 20, generator=generator, dtype=torch.float64).log_softmax(dim=-1)


def test_alpha_zero_is_aligned_itself():
    aligned = random_log_probs(1)
    assert contrastive_log_probs(aligned, random_log_probs(2), 0.0, 0.1) is aligned


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("plausibility", [0.01, 0.3, 1.0])
def test_formula(alpha, plausibility):
    aligned, base = random_log_probs(1), random_log_probs(2)
    p_a, p_b = aligned.exp(), base.exp()
    score = p_a * (p_a / p_b) ** alpha * (p_a >= plausibility * p_a.max(-1, keepdim=True).values)
    log_q = contrastive_log_probs(aligned, base, alpha, plausibility)
    assert torch.allclose(log_q.exp(), score / score.sum(-1, keepdim=True), rtol=1e-10)


def test_full_plausibility_keeps_the_likeliest_token_only():
    log_q = contrastive_log_probs(random_log_probs(1), random_log_probs(2), 1.0, 1.0)
    assert torch.equal(log_q.exp().argmax(-1), random_log_probs(1).argmax(-1))
    assert torch.allclose(log_q.exp().amax(-1), torch.ones(50).double())


def test_equal_models_give_aligned_renormalised_over_plausible_tokens():
    aligned = random_log_probs(1)
    log_q = contrastive_log_probs(aligned, aligned, 2.0, 0.1)
    kept = log_q > -math.inf
    share = torch.where(kept, aligned.exp(), 0.0)
    assert torch.allclose(log_q.exp(), share / share.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_excluded_tokens_cause_no_nan(dtype):
    aligned = log_probs([0.5, 0.5, 0.0, 0.0], [0.6, 0.3, 0.1, 0.0], dtype=dtype).requires_grad_()
    base = log_probs([0.5, 0.25, 0.25, 0.0], [0.0, 0.5, 0.0, 0.5], dtype=dtype).requires_grad_()
    log_q = contrastive_log_probs(aligned, base, 1.0, 0.2)
    assert log_q.exp()[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0], rel=1e-6)
    assert log_q.exp()[1].tolist() == pytest.approx([1, 0, 0, 0])  # base excludes a plausible token: q goes there
    kl = forward_kl(log_q, torch.zeros_like(aligned).log_softmax(-1))
    assert kl.isfinite().all()
    kl.sum().backward()
    assert aligned.grad.isfinite().all()
    assert base.grad.isfinite().all()
