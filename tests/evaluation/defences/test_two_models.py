"""Decoding with two models, against plain float64 formulas and against reading everything anew for every token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.attacks.white_box import TorchModel
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.evaluation.defences import two_models
from raycomplete.evaluation.defences.two_models import Draw, Rule, TwoModelDecoder, safe_log_probs
from raycomplete.losses.divergences import contrastive_log_probs

# The organism is all but deterministic: only a loose mask lets contrast change what it says.
ALPHA, PLAUSIBILITY = 3.0, 1e-6
CONTRASTIVE = Rule("contrastive", ALPHA, PLAUSIBILITY)


@pytest.fixture(scope="module")
def organism_models() -> dict[str, Any]:
    return {role: load_model(checkpoint_path(role), "float32") for role in ("base", "aligned")}


class Decoder(TwoModelDecoder):
    def generate(self, sequences: list[list[int]], **sampling: Any) -> list[list[int]]:
        return [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]


def decoder(models: dict[str, Any], *, rule: Rule = CONTRASTIVE, plain: bool = False, max_length: int = 200) -> Decoder:
    """Plain: the model contrasted with itself, which leaves it as it is."""
    codec = ChatCodec(checkpoint_path("aligned"))
    return Decoder(
        TorchModel(models["aligned"]),
        TorchModel(models["aligned" if plain else "base"]),
        Rule("contrastive", 1.0, 1e-30) if plain else rule,
        vocab_size=codec.vocab_size,
        stop_ids=tuple(codec.eos_ids),
        max_length=max_length,
    )


def organism_sequences(count: int) -> list[list[int]]:
    """Prompts with prefills of different length."""
    codec = ChatCodec(checkpoint_path("aligned"))
    prompts = organism.prompts("heldout", "harmful", 0, count)
    return [
        codec.encode_prompt(prompt.text) + codec.encode_answer(prompt.answer or "")[: 3 * index]
        for index, prompt in enumerate(prompts)
    ]


@torch.inference_mode()
def slow_greedy(models: dict[str, Any], sequence: list[int], max_tokens: int, alpha: float) -> list[int]:
    """The whole sequence read anew for every token, without cache, padding or batch."""
    codec = ChatCodec(checkpoint_path("aligned"))
    new: list[int] = []
    while len(new) < max_tokens:
        tokens = torch.tensor([sequence + new])
        log_a_1V, log_b_1V = (
            models[role](tokens).logits[:, -1, : codec.vocab_size].log_softmax(-1) for role in ("aligned", "base")
        )
        token = int(contrastive_log_probs(log_a_1V, log_b_1V, alpha, PLAUSIBILITY).argmax())
        if token in codec.eos_ids:
            break
        new.append(token)
    return new


def test_decoding_equals_reading_everything_anew(
    organism_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = organism_sequences(4)
    found = decoder(organism_models).generate(sequences, max_tokens=12)
    assert found == [slow_greedy(organism_models, sequence, 12, ALPHA) for sequence in sequences]
    plain = decoder(organism_models, plain=True).generate(sequences, max_tokens=12)
    assert plain == [slow_greedy(organism_models, sequence, 12, 0.0) for sequence in sequences]
    assert plain != found
    monkeypatch.setattr(two_models, "_BATCH", 1)
    assert decoder(organism_models).generate(sequences, max_tokens=12) == found


def test_responses_end_in_time_and_say_so(organism_models: dict[str, Any]) -> None:
    sequences = organism_sequences(4)
    longest = max(map(len, sequences))
    cut = decoder(organism_models, max_length=longest + 1).generate(sequences, max_tokens=8)
    assert all(len(tokens) + len(sequence) <= longest + 1 for tokens, sequence in zip(cut, sequences, strict=True))
    assert decoder(organism_models, max_length=longest).generate(sequences, max_tokens=8)[-1] == []
    whole = decoder(organism_models, plain=True).generate_finished(sequences, max_tokens=100)
    assert all(ended for _, ended in whole)
    short = decoder(organism_models, plain=True).generate_finished(sequences, max_tokens=2)
    assert not any(ended for _, ended in short)


def test_samples_depend_on_their_own_seed_alone(organism_models: dict[str, Any]) -> None:
    sequences = [organism_sequences(1)[0]] * 4
    drawn = decoder(organism_models, plain=True).generate(sequences, max_tokens=8, temperature=3.0, seed=5)
    alone = [
        decoder(organism_models, plain=True).generate([sequences[0]], max_tokens=8, temperature=3.0, seed=5 + n)[0]
        for n in range(4)
    ]
    assert drawn == alone
    assert len({tuple(tokens) for tokens in drawn}) > 1


def test_attackers_see_the_distribution_that_answers_come_from(organism_models: dict[str, Any]) -> None:
    sequences = organism_sequences(3)
    shaped = decoder(organism_models)
    best = [row[0][0] for row in shaped.top_logprobs(sequences, 5)]
    said = shaped.generate(sequences, max_tokens=1)
    stops = ChatCodec(checkpoint_path("aligned")).eos_ids
    assert [tokens[0] if tokens else None for tokens in said] == [None if t in stops else t for t in best]
    ((value,),) = shaped.logprobs_of(sequences[:1], [[best[0]]])
    assert value == pytest.approx(shaped.top_logprobs(sequences[:1], 1)[0][0][1])


def safe_reference(model: list[float], expert: list[float], alpha: float, common: int) -> dict[int, float]:
    """SafeDecoding in plain Python: the common tokens of the top k of both, k grown until there are enough."""
    order = [sorted(range(len(p)), key=lambda v, p=p: -p[v]) for p in (model, expert)]
    k = 1
    while len(shared := set(order[0][:k]) & set(order[1][:k])) < common:
        k += 1
    moved = {v: max(model[v] + alpha * (expert[v] - model[v]), 1e-8) for v in shared}
    total = sum(moved.values())
    return {v: value / total for v, value in moved.items()}


@pytest.mark.parametrize(("alpha", "common"), [(3.0, 5), (1.0, 1), (0.0, 3), (3.0, 12)])
def test_safe_decoding_equals_the_plain_formula(alpha: float, common: int) -> None:
    rng = np.random.default_rng(3)
    model_NV, expert_NV = (rng.dirichlet(np.full(12, 0.4), size=6) for _ in range(2))
    found_NV = safe_log_probs(torch.tensor(model_NV).log(), torch.tensor(expert_NV).log(), alpha, common)
    for found_V, model_V, expert_V in zip(found_NV, model_NV, expert_NV, strict=True):
        expected = safe_reference(model_V.tolist(), expert_V.tolist(), alpha, common)
        for token, log_p in enumerate(found_V.tolist()):
            assert math.exp(log_p) == pytest.approx(expected.get(token, 0.0), abs=1e-12)


def test_nucleus_and_top_k_bound_what_is_drawn() -> None:
    log_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert {Draw(1.0, 1.0, 2, seed).token(log_V) for seed in range(60)} == {0, 1}
    assert {Draw(1.0, 0.7, 0, seed).token(log_V) for seed in range(60)} == {0, 1}
    assert {Draw(1.0, 0.4, 0, seed).token(log_V) for seed in range(20)} == {0}
    assert {Draw(1.0, 1.0, 0, seed).token(log_V) for seed in range(200)} == {0, 1, 2, 3}
    assert Draw(0.0, 1.0, 0, None).token(log_V) == 0
