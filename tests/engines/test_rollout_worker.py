"""The rollout actor on a real vLLM engine: right tokens, right weights, reproducible samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts

pytestmark = pytest.mark.slow

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def sequences(codec: ChatCodec) -> list[list[int]]:
    return [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 12)]


def greedy_by_transformers(role: str, sequences: list[list[int]], eos_ids: frozenset[int]) -> list[list[int]]:
    model = load_model(checkpoint_path(role), "float32")  # type: ignore[arg-type]
    answers = []
    for sequence in sequences:
        tokens: list[int] = []
        while len(tokens) < MAX_TOKENS:
            with torch.inference_mode():
                token = int(model(torch.tensor([sequence + tokens])).logits[0, -1].argmax())
            if token in eos_ids:
                break
            tokens.append(token)
        answers.append(tokens)
    return answers


def test_other_weights_take_the_place_of_the_first_ones_entirely(
    generator: Any, codec: ChatCodec, sequences: list[list[int]]
) -> None:
    """The organism's head is tied: a reload that forgets the head speaks with a mixture of the two models."""
    expected = {role: greedy_by_transformers(role, sequences, codec.eos_ids) for role in ("base", "aligned")}
    assert expected["base"] != expected["aligned"]
    for role in ("base", "aligned", "base"):
        client = generator.with_weights(str(checkpoint_path(role)))  # type: ignore[arg-type]
        assert client.generate(sequences, max_tokens=MAX_TOKENS) == expected[role], role


def test_seeded_samples_repeat_and_other_seeds_differ(generator: Any, sequences: list[list[int]]) -> None:
    aligned = generator.with_weights(str(checkpoint_path("aligned")))
    draws = [aligned.generate(sequences, max_tokens=16, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_response_that_ended_says_so_and_holds_no_end_token(
    generator: Any, codec: ChatCodec, sequences: list[list[int]]
) -> None:
    aligned = generator.with_weights(str(checkpoint_path("aligned")))
    for tokens, finished in aligned.generate_finished(sequences, max_tokens=60):
        assert finished
        assert not codec.eos_ids & set(tokens)
    for tokens, finished in aligned.generate_finished(sequences, max_tokens=3):
        assert (len(tokens), finished) == (3, False)
