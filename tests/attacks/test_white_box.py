"""The white box on the organism, compared with plain forward passes that cache nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raycomplete.attacks.trial import Decoding
from raycomplete.attacks.white_box import SuffixProblem, TorchModel, filtered
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts

MAX_TOKENS = 8


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


def test_greedy_and_repeated_samples(model: Any, codec: ChatCodec, sequences: list[list[int]]) -> None:
    box = TorchModel(model)
    greedy = box.sample(sequences, Decoding(MAX_TOKENS), seed=0, stop_ids=codec.eos_ids)
    for sequence, tokens in zip(sequences, greedy, strict=True):
        current = list(sequence)
        for token in tokens:
            assert token == int(plain_logprobs(model, current).argmax())
            current.append(token)
        assert len(tokens) == MAX_TOKENS or int(plain_logprobs(model, current).argmax()) in codec.eos_ids
    hot = Decoding(MAX_TOKENS, temperature=1.5, top_k=20)
    draws = [box.sample(sequences, hot, seed=seed, stop_ids=codec.eos_ids) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    alone = box.sample(sequences[1:2], hot, seed=2, stop_ids=codec.eos_ids)
    assert alone == draws[0][1:2], "sequence i is drawn under seed + i, whatever stands beside it"


@given(
    logits=st.lists(st.integers(-9, 9), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.05, 2),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 12),
)
def test_filters_keep_the_likeliest(logits: list[int], temperature: float, top_p: float, top_k: int) -> None:
    logprobs_1V = torch.log_softmax(torch.tensor([logits], dtype=torch.float64), dim=-1)
    kept_V = filtered(logprobs_1V, Decoding(1, temperature, top_p, top_k))[0].numpy()
    expected = np.exp((np.asarray(logits) - max(logits)) / temperature)
    order = np.argsort(-expected)
    if top_k:
        expected[order[top_k:]] = 0
    expected /= expected.sum()
    mass_before = np.cumsum(expected[order]) - expected[order]
    assume(np.all(np.abs(mass_before - top_p) > 1e-9))  # where rounding decides, either is right
    if top_p < 1:
        expected[order[mass_before > top_p]] = 0
    assert kept_V == pytest.approx(expected / expected.sum(), abs=1e-9)
    assert filtered(logprobs_1V, Decoding(1))[0].argmax() == np.argmax(logits)


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
