"""Divergences, the contrastive target and base-favored tokens: identities and values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raycomplete.losses import Head, HiddenStates, LossInputs, LossOutput, distillation_loss
from raycomplete.losses.base_favored import base_favored_mask, forward_kl
from raycomplete.losses.divergences import contrastive_log_probs
from raycomplete.runtime.errors import NotFiniteError
from tests.losses.conftest import ANCHOR, PUSH_FORWARD, RECOVERY, loss_settings

# Identity heads make logits the hidden states themselves.
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def kl(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * (first / second).log()).sum())


def one_row(student: torch.Tensor, aligned: torch.Tensor, term: int, **settings: object) -> LossOutput:
    head = Head(torch.eye(len(student), dtype=torch.float64))
    states = [HiddenStates(item.log()[None], head) for item in (student, aligned, student)]
    inputs = LossInputs(*states, torch.tensor([term]), torch.ones(1, dtype=torch.float64))
    return distillation_loss(inputs, loss_settings(**settings))


@pytest.mark.parametrize(("term", "name"), [(ANCHOR, "anchor"), (RECOVERY, "recovery")])
def test_values_worked_out_by_hand(term, name):
    mean = (P + Q) / 2
    expected = {"forward_kl": kl(Q, P), "reverse_kl": kl(P, Q), "jsd": (kl(P, mean) + kl(Q, mean)) / 2}
    for divergence, value in expected.items():
        output = one_row(P, Q, term, **{f"{name}_divergence": divergence})
        assert output.total.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_temperature_is_that_of_softer_models_times_its_square(divergence):
    softer = [item.sqrt() / item.sqrt().sum() for item in (P, Q)]
    warm = one_row(P, Q, ANCHOR, anchor_divergence=divergence, temperature=2.0)
    assert warm.total.item() == pytest.approx(
        4 * one_row(*softer, ANCHOR, anchor_divergence=divergence).total.item(), rel=1e-12
    )


def test_push_forward_is_the_divergence_at_its_temperature():
    pushed = one_row(P, Q, PUSH_FORWARD, push_temperature=2.0, push_forward=1.0)
    assert pushed.total.item() == pytest.approx(one_row(P, Q, RECOVERY, temperature=2.0).total.item(), rel=1e-12)


def test_a_teacher_that_excludes_what_the_student_allows_is_infinite_for_reverse_kl_only():
    excluding = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    head = Head(torch.eye(3, dtype=torch.float64))
    bias_V = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    aligned = Head(torch.eye(3, dtype=torch.float64), bias_V)
    aligned_NH = excluding.clamp(min=0.1).log()[None]
    student, teacher = HiddenStates(P.log()[None], head), HiddenStates(aligned_NH, aligned)
    inputs = LossInputs(student, teacher, None, torch.tensor([ANCHOR]), torch.ones(1).double())
    mean = (P + excluding) / 2
    jsd = (kl(P, mean) + kl(excluding[:2], mean[:2])) / 2
    assert distillation_loss(inputs, loss_settings(anchor_divergence="jsd")).total.item() == pytest.approx(jsd)
    with pytest.raises(NotFiniteError, match="loss of the student"):
        distillation_loss(inputs, loss_settings(anchor_divergence="reverse_kl"))


def log_probs(*rows: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().to(dtype)


def random_log_probs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, 20, generator=generator, dtype=torch.float64).log_softmax(dim=-1)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("plausibility", [0.01, 0.3, 1.0])
def test_formula(alpha, plausibility):
    aligned, base = random_log_probs(1), random_log_probs(2)
    p_a, p_b = aligned.exp(), base.exp()
    score = p_a * (p_a / p_b) ** alpha * (p_a >= plausibility * p_a.max(-1, keepdim=True).values)
    log_q = contrastive_log_probs(aligned, base, alpha, plausibility)
    assert torch.allclose(log_q.exp(), score / score.sum(-1, keepdim=True), rtol=1e-10)


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


ALIGNED = log_probs([0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25])
BASE = log_probs([0.1, 0.5, 0.1, 0.3], [0.0, 0.5, 0.25, 0.25])


def test_mask_needs_more_than_aligned_and_at_least_tau():
    assert base_favored_mask(ALIGNED, BASE, 0.0).tolist() == [[False, True, False, True], [False, True, False, False]]
    assert base_favored_mask(ALIGNED, BASE, 0.4).tolist() == [[False, True, False, False], [False, True, False, False]]
    assert not base_favored_mask(ALIGNED, BASE, 0.6).any()


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
