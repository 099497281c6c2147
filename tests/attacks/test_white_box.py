"""The white box on the organism, compared with plain forward passes that cache nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForTokenClassification, MistralConfig, MistralForCausalLM

from raycomplete.attacks.target import SuffixProblem
from raycomplete.attacks.white_box import TokenClassifier, TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import check_token_classifier, load_model, load_token_classifier
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.runtime.errors import CheckpointError


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


class Counting:
    """A model that remembers the shape of what it was given."""

    def __init__(self, model: Any) -> None:
        self.model, self.shapes = model, list[tuple[int, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def requires_grad_(self, value: bool) -> Any:
        self.model.requires_grad_(value)
        return self

    def __call__(self, ids: torch.Tensor, **settings: Any) -> Any:
        self.shapes.append((ids.shape[0], ids.shape[1]))
        return self.model(ids, **settings)


def walk(sequences: list[list[int]], seed: int, num_steps: int) -> Iterator[list[list[int]]]:
    """Rows that go on, go back by up to three tokens and take another, and end, as a search does."""
    draw = random.Random(seed)
    rows = [list(sequence) for sequence in sequences]
    least = {id(row): len(row) for row in rows}
    yield [list(row) for row in rows]
    for step in range(num_steps):
        for row in rows:
            if draw.random() < 0.4:
                del row[max(len(row) - draw.randint(1, 3), least[id(row)]) :]
            row.append(20 + draw.randrange(100))
        if step == num_steps // 2:
            del rows[1]
        yield [list(row) for row in rows]


def test_rows_may_go_back_and_end(model: Any, sequences: list[list[int]]) -> None:
    """One token a row is read at each step, and nothing else changes."""
    counting = Counting(model)
    box = TorchModel(counting)
    for current in walk(sequences, seed=3, num_steps=16):
        found = box.logprobs_of(current, [[1, 50, 160]] * len(current))
        for row, sequence in zip(found, current, strict=True):
            assert row == pytest.approx(plain_logprobs(model, sequence)[[1, 50, 160]].tolist(), abs=2e-4)
        box.top_logprobs(current, 2)  # of the same rows: nothing is read
    assert counting.shapes[1:] == [(3, 1)] * 8 + [(2, 1)] * 8
    assert len(box.top_logprobs(sequences, 10**6)[0]) == box.vocab_size()
    assert counting.shapes[-1][1] > 1, "other rows are read anew"


def test_layers_with_a_window_read_rows_anew_that_went_back() -> None:
    """A gap in the cache would push tokens out of a window of eight."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=161,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        initializer_range=0.3,
    )
    windowed = MistralForCausalLM(config).eval()
    counting = Counting(windowed)
    box = TorchModel(counting)
    for current in walk([[5, 6, 7], [8, 9, 10, 11, 12], [3]], seed=4, num_steps=14):
        for row, sequence in zip(box.logprobs_of(current, [[1, 50, 160]] * len(current)), current, strict=True):
            assert row == pytest.approx(plain_logprobs(windowed, sequence)[[1, 50, 160]].tolist(), abs=2e-4)
    assert {length for _, length in counting.shapes} >= {1}, "as long as none has gone back"


def test_a_token_classifier_reads_the_last_token(codec: ChatCodec, tmp_path: Path) -> None:
    """On a tiny random model, against plain passes of single texts; saved, checked and loaded as a run does it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=codec.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        num_labels=2,
    )
    LlamaForTokenClassification(config).save_pretrained(str(tmp_path))
    codec.save(tmp_path)
    check_token_classifier(resolve_checkpoint(str(tmp_path), role="helper"))
    model = load_token_classifier(tmp_path, "float32")
    asked = [prompt.text for prompt in prompts("heldout", "harmful", 0, 40)]
    answers = [
        " ".join((prompt.answer or "").split()[: 1 + n])
        for n, prompt in enumerate(prompts("heldout", "harmful", 0, 40))
    ]
    expected = []
    for question, answer in zip(asked, answers, strict=True):
        ids = [*codec.encode_prompt(question), *codec.encode_answer(answer)]
        with torch.no_grad():
            expected.append(bool(model(torch.tensor([ids])).logits[0, -1].argmax() == 1))
    assert TokenClassifier(model, codec).accepts(asked, answers) == expected
    assert 0 < sum(expected) < len(expected), "both labels occur"
    with pytest.raises(CheckpointError, match="no token classifier"):
        check_token_classifier(checkpoint_path("aligned"))
    LlamaForTokenClassification(
        config.from_dict({**config.to_dict(), "id2label": {0: "a", 1: "b", 2: "c"}})
    ).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="with two labels"):
        check_token_classifier(tmp_path)


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
