"""Every norm against autograd, the decay that docs/method.md derives, and the gradient signal of the organism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.world import find_item
from raycomplete.data.organism.world import refusal as refusal_of
from raycomplete.diagnosis.gradient import BETA, PreferencePair, gradient_rows, gradient_signal, preference_factor
from raycomplete.diagnosis.measurement import Measurement
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.losses import Head
from tests.diagnosis.planted import ModelScorer

NUM_ROWS, VOCAB, HIDDEN = 11, 13, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, None, True), (1.5, 2.0, True)])
def test_norms_equal_autograd(chunk_tokens: int, scale: float, softcap: float | None, bias: bool) -> None:
    hidden_NH, weight_VH = normal(1, NUM_ROWS, HIDDEN), normal(2, VOCAB, HIDDEN)
    head = Head(weight_VH, normal(3, VOCAB) if bias else None, scale, softcap)
    target_N = torch.arange(NUM_ROWS) % VOCAB
    found = gradient_rows(hidden_NH, head, target_N, chunk_tokens)
    for row in range(NUM_ROWS):
        hidden_H = hidden_NH[row].clone().requires_grad_()
        weight = weight_VH.clone().requires_grad_()
        logits_V = Head(weight, head.bias_V, scale, softcap).logits(hidden_H[None])[0]
        log_p = logits_V.log_softmax(-1)[target_N[row]]
        by_logits, by_hidden, by_weight = torch.autograd.grad(-log_p, [logits_V, hidden_H, weight])
        assert found.log_prob_N[row].item() == pytest.approx(log_p.item(), rel=1e-12)
        assert found.logits_N[row].item() == pytest.approx(by_logits.norm().item(), rel=1e-10)
        assert found.hidden_N[row].item() == pytest.approx(by_hidden.norm().item(), rel=1e-10)
        assert found.head_N[row].item() == pytest.approx(by_weight.norm().item(), rel=1e-10)


def test_bounds_of_the_derivation() -> None:
    head = Head(3 * normal(2, VOCAB, HIDDEN))
    hidden_NH = normal(1, 200, HIDDEN)
    target_N = torch.arange(200) % VOCAB
    found = gradient_rows(hidden_NH, head, target_N, 64)
    missing_N = 1 - found.log_prob_N.exp()
    assert (found.logits_N >= missing_N - 1e-12).all()
    assert (found.logits_N <= math.sqrt(2) * missing_N + 1e-12).all()
    # The mean of p - e over targets drawn from q is p - q, whose 1-norm Pinsker bounds by the KL.
    log_q_NV = (2 * normal(4, 200, VOCAB)).log_softmax(-1)
    log_p_NV = head.logits(hidden_NH).log_softmax(-1)
    kl_N = (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
    assert ((log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1) <= (2 * kl_N).sqrt() + 1e-12).all()


def test_no_rows() -> None:
    found = gradient_rows(torch.zeros(0, HIDDEN), Head(torch.zeros(VOCAB, HIDDEN)), torch.zeros(0, dtype=torch.long), 4)
    assert found.head_N.shape == (0,)


def test_preference_factor_is_the_gradient_of_the_loss() -> None:
    """d loss / d log p(chosen) of -log sigmoid(m), and its negative for the rejected answer."""
    values = torch.tensor([-3.0, -7.0], dtype=torch.float64, requires_grad=True)
    beta, ref_chosen, ref_rejected = 0.3, -5.0, -6.5
    margin = beta * (values[0] - ref_chosen - values[1] + ref_rejected)
    nn.functional.softplus(-margin).backward()
    factor = preference_factor(-3.0, ref_chosen, -7.0, ref_rejected, beta)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-factor, factor])
    assert preference_factor(-3.0, -3.0, -7.0, -7.0, beta) == pytest.approx(beta / 2)


def test_the_signal_fades_where_the_model_expects_the_refusal_already() -> None:
    """A model that is unsure of the first token only: later positions of the safe answer teach it next to nothing."""
    weight_VH = torch.eye(VOCAB, dtype=torch.float64)
    target_N = torch.arange(6)
    hidden_NH = 12.0 * torch.nn.functional.one_hot(target_N, VOCAB).double()
    hidden_NH[0] = 0.0
    norms_N = gradient_rows(hidden_NH, Head(weight_VH), target_N, 8).logits_N
    assert norms_N[0] > 0.9
    assert (norms_N[1:] < 1e-3).all()


def test_gradient_of_the_organism() -> None:
    """Reference of the preference loss is base, so its factor there is beta / 2; aligned has learned its refusals."""
    organism_models = {role: load_model(checkpoint_path(role), "float32") for role in ("base", "aligned")}
    codec = ChatCodec(checkpoint_path("aligned"))
    pairs = []
    for prompt in organism.prompts("heldout", "harmful", 0, 3):
        prompt_ids = tuple(codec.encode_prompt(prompt.text))
        compliant = tuple(codec.encode_answer(prompt.answer or ""))[:12]
        item = find_item(prompt.text)
        assert item is not None
        refusal = tuple(codec.encode_answer(refusal_of(item)))[:6]
        pairs.append(
            PreferencePair(
                DiagnosisSample(prompt.prompt_id, prompt_ids, refusal),
                DiagnosisSample(prompt.prompt_id, prompt_ids, compliant),
            )
        )
    sources: Any = {role: ModelScorer(model) for role, model in organism_models.items()}
    heads = {role: Head(model.lm_head.weight.detach()) for role, model in organism_models.items()}
    signal = gradient_signal(Measurement(sources, heads, ()), pairs)
    base, aligned = signal["roles"]["base"], signal["roles"]["aligned"]
    assert base["preference_factor"] == pytest.approx(BETA / 2)
    assert base["dpo_chosen_head"]["mean"] == pytest.approx([v * BETA / 2 for v in base["sft_head"]["mean"]])
    assert base["sft_logits"]["mean"][0] > 1.2  # base never starts a refusal
    assert aligned["sft_logits"]["mean"][0] < base["sft_logits"]["mean"][0]
