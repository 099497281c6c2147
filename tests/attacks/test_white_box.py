"""The white box on the organism, compared with plain forward passes that cache nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.attacks.target import SuffixProblem
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(checkpoint_path("aligned"), "float32")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def sequences(codec: ChatCodec) -> list[list[int]]:
    asked = [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 3)]
    return [asked[0], asked[1][:-3], asked[2] + codec.encode_answer("sure , here is")]


def plain_logprobs(model: Any, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([sequence])).logits[0, -1], dim=-1)


def test_batches_and_caches_change_nothing(model: Any, sequences: list[list[int]]) -> None:
    """Sequences of several lengths, read whole, extended token by token, and read anew."""
    box = TorchModel(model)
    current = [list(sequence) for sequence in sequences]
    for step in range(4):
        expected = [plain_logprobs(model, sequence) for sequence in current]
        asked = [[1, 50, 160]] * len(current)
        for row, logprobs in zip(box.logprobs_of(current, asked), expected, strict=True):
            assert row == pytest.approx(logprobs[[1, 50, 160]].tolist(), abs=2e-4)
        for best, logprobs in zip(box.top_logprobs(current, 3), expected, strict=True):
            assert [token for token, _ in best] == logprobs.topk(3).indices.tolist()
            assert [value for _, value in best] == pytest.approx(logprobs.topk(3).values.tolist(), abs=2e-4)
        current = [[*sequence, 20 + step] for sequence in current]


@pytest.fixture(scope="module")
def problem(codec: ChatCodec) -> SuffixProblem:
    prompt = prompts("heldout", "harmful", 0, 1)[0]
    asked = codec.encode_prompt(prompt.text)
    return SuffixProblem(tuple(asked[:-2]), tuple(asked[-2:]), tuple(codec.encode_answer(prompt.answer or "")[:6]))


def plain_loss(model: Any, problem: SuffixProblem, suffix: list[int]) -> float:
    whole = [*problem.before, *suffix, *problem.after, *problem.target]
    start = len(whole) - len(problem.target)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, start - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(problem.target)))


def test_losses_are_those_of_plain_passes(model: Any, problem: SuffixProblem) -> None:
    box = TorchModel(model)
    suffixes = [[20, 30, 40], [21, 22, 23], [100, 101, 150]]
    expected = [plain_loss(model, problem, suffix) for suffix in suffixes]
    assert box.suffix_losses(problem, suffixes) == pytest.approx(expected, abs=1e-4)
    assert box.suffix_losses(problem, suffixes[:1]) == pytest.approx(expected[:1], abs=1e-4), "the cache is unharmed"
    other = SuffixProblem(problem.before[:-1], problem.after, problem.target)
    assert box.suffix_losses(other, suffixes[:1]) == pytest.approx([plain_loss(model, other, suffixes[0])], abs=1e-4)


@pytest.fixture(scope="module")
def double() -> Any:
    return load_model(checkpoint_path("aligned"), "float32").double()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_gradient_agrees_with_finite_differences(double: Any, problem: SuffixProblem, seed: int) -> None:
    """Central differences along the one-hot axes at random suffixes and tokens."""
    generator = np.random.default_rng(seed)
    suffix = generator.integers(10, 160, size=4).tolist()
    gradient_SV = TorchModel(double).suffix_gradient(problem, suffix)
    assert gradient_SV.shape == (4, TorchModel(double).vocab_size())
    embedding_VH = double.get_input_embeddings().weight.detach()
    tail_H = embedding_VH[[*problem.after, *problem.target]]

    def loss(mixed_SV: torch.Tensor) -> float:
        inputs = torch.cat([embedding_VH[list(problem.before)], mixed_SV @ embedding_VH, tail_H])[None]
        with torch.no_grad():
            logits = double(inputs_embeds=inputs).logits[0, -len(problem.target) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(problem.target)))

    one_hot_SV = torch.nn.functional.one_hot(torch.tensor(suffix), embedding_VH.shape[0]).double()
    for _ in range(4):
        position, token = int(generator.integers(4)), int(generator.integers(161))
        step_SV = torch.zeros_like(one_hot_SV)
        step_SV[position, token] = 3e-3  # large, since norms inside the model work in float32 whatever its weights
        numeric = (loss(one_hot_SV + step_SV) - loss(one_hot_SV - step_SV)) / 6e-3
        assert gradient_SV[position, token] == pytest.approx(numeric, rel=0.01, abs=5e-4)


def test_nothing_of_the_model_keeps_a_gradient(model: Any, problem: SuffixProblem) -> None:
    TorchModel(model).suffix_gradient(problem, [20, 21])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
