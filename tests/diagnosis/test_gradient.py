"""The gradient signal of the organism, by formula and by backward pass."""

from __future__ import annotations

from typing import Any

import pytest

from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.world import find_item
from raycomplete.data.organism.world import refusal as refusal_of
from raycomplete.diagnosis.gradient import Pair, exact_gradient, gradient_signal
from raycomplete.diagnosis.partitions import Walk
from raycomplete.diagnosis.samples import Sample
from raycomplete.losses import Head
from tests.commands.planted import (
    SETTINGS,
    ModelScorer,
)


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
            Pair(Sample(prompt.prompt_id, prompt_ids, refusal), Sample(prompt.prompt_id, prompt_ids, compliant))
        )
    sources: Any = {role: ModelScorer(model) for role, model in organism_models.items()}
    heads = {role: Head(model.lm_head.weight.detach()) for role, model in organism_models.items()}
    settings = SETTINGS.model_copy(update={"full_prompts": 2, "gradient_prompts": 3})
    walk = Walk(sources, heads, (), settings)
    signal = gradient_signal(walk, pairs, settings)
    base, aligned = signal["roles"]["base"], signal["roles"]["aligned"]
    assert base["preference_factor"] == pytest.approx(settings.beta / 2)
    assert base["dpo_chosen_head"]["mean"] == pytest.approx([v * settings.beta / 2 for v in base["sft_head"]["mean"]])
    assert base["sft_logits"]["mean"][0] > 1.2  # base never starts a refusal
    assert aligned["sft_logits"]["mean"][0] < base["sft_logits"]["mean"][0]
    paths = {role: checkpoint_path(role) for role in ("base", "aligned")}
    exact = exact_gradient(paths, pairs, signal, settings)
    assert exact["full_prompts"] == 2
    for found in exact["roles"].values():
        assert len(found["sft_all"]["mean"]) == len(found["sft_head"]["mean"])
        assert min(found["sft_all"]["mean"]) > 0
    assert exact["estimator_correlation"] > 0.9
    assert base["sft_all"]["mean"][0] > 5 * aligned["sft_all"]["mean"][0]
