"""Base-favored sets and the position profile."""

from __future__ import annotations

import math

import pytest
import torch

from raycomplete.losses.base_favored import (
    base_favored_mask,
    forward_kl,
)


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


def test_trained_depth_by_hand():
    first = 0.7 * math.log(7) + 0.2 * math.log(0.4)
    depth = forward_kl(ALIGNED, BASE)
    assert depth[0].item() == pytest.approx(first)
    assert depth[1].item() == math.inf  # base excludes a token that aligned allows


def test_formulas_on_random_rows():
    aligned, base = random_log_probs(1), random_log_probs(2)
    p_a, p_b = aligned.exp(), base.exp()
    mask = (p_b > p_a) & (p_b >= 0.05)
    assert torch.equal(base_favored_mask(aligned, base, 0.05), mask)
    assert torch.allclose(forward_kl(aligned, base), (p_a * (p_a / p_b).log()).sum(-1))
    assert (forward_kl(aligned, base) > 0).all()


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
