"""Contrastive decoding against reading everything anew for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raycomplete.config import ContrastiveDecodingConfig
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.diagnosis.contrastive import ContrastiveDecoder
from raycomplete.losses.divergences import contrastive_log_probs

# The organism is all but deterministic: only a loose mask lets contrast change what it says.
ALPHA, PLAUSIBILITY = 3.0, 1e-6


@pytest.fixture(scope="module")
def organism_models() -> dict[str, Any]:
    return {role: load_model(checkpoint_path(role), "float32") for role in ("base", "aligned")}


def decoder(
    models: dict[str, Any], *, alpha: float = ALPHA, batch: int = 3, max_length: int = 200
) -> ContrastiveDecoder:
    codec = ChatCodec(checkpoint_path("aligned"))
    return ContrastiveDecoder(
        models["aligned"],
        models["base"],
        vocab_size=codec.vocab_size,
        stop_ids=tuple(codec.eos_ids),
        settings=ContrastiveDecodingConfig(alpha=alpha, plausibility=PLAUSIBILITY, batch=batch),
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


def test_contrastive_decoding_equals_reading_everything_anew(organism_models: dict[str, Any]) -> None:
    sequences = organism_sequences(4)
    found = decoder(organism_models).generate(sequences, max_tokens=12)
    assert found == [slow_greedy(organism_models, sequence, 12, ALPHA) for sequence in sequences]
    plain = replace(decoder(organism_models), base=None).generate(sequences, max_tokens=12)
    assert plain == [slow_greedy(organism_models, sequence, 12, 0.0) for sequence in sequences]
    assert plain != found
    assert decoder(organism_models, batch=1).generate(sequences, max_tokens=12) == found


def test_responses_end_in_time_and_sampling_is_refused(organism_models: dict[str, Any]) -> None:
    sequences = organism_sequences(4)
    longest = max(map(len, sequences))
    cut = decoder(organism_models, max_length=longest + 1).generate(sequences, max_tokens=8)
    assert all(len(tokens) + len(sequence) <= longest + 1 for tokens, sequence in zip(cut, sequences, strict=True))
    assert decoder(organism_models, max_length=longest).generate(sequences, max_tokens=8)[-1] == []
    with pytest.raises(ValueError, match="greedy"):
        decoder(organism_models).generate(sequences, max_tokens=8, temperature=0.5, seed=1)
