"""The work of one GCG step: what it reads, what it computes, and that it chooses as a plain step does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from raycomplete.attacks.suffix import GcgAttack, GcgConfig, Search, first_sentence, least, usable_tokens
from raycomplete.attacks.target import AttackTools, SuffixProblem, Target
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import OrganismJudge, checkpoint_path, prompts
from raycomplete.runtime.types import Prompt
from tests.attacks import plain_gcg as plain
from tests.attacks.scripted import made

CONFIG = GcgConfig(steps=3, search_width=24, top=16, suffix_tokens=6)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(checkpoint_path("aligned"), "float32")
    torch.set_num_threads(threads)


@pytest.fixture
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture
def behaviour() -> Prompt:
    return prompts("heldout", "harmful", 0, 1)[0]


@pytest.fixture
def search(codec: ChatCodec, behaviour: Prompt) -> Search:
    return GcgAttack(CONFIG).start(codec, behaviour)


class Watched:
    """A model that remembers how many tokens it read and logits it gave in each pass."""

    def __init__(self, model: Any, largest_batch: int = 10**6) -> None:
        self._model, self._largest_batch = model, largest_batch
        self.passes: list[tuple[int, int, int]] = []  # rows, tokens, positions with logits
        self.parameters, self.get_input_embeddings = model.parameters, model.get_input_embeddings

    def requires_grad_(self, on: bool) -> Watched:
        self._model.requires_grad_(on)
        return self

    def __call__(self, input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if len(inputs) > self._largest_batch:
            raise torch.OutOfMemoryError("CUDA out of memory")
        output = self._model(input_ids=input_ids, inputs_embeds=inputs_embeds, **rest)
        self.passes.append((len(inputs), inputs.shape[1], output.logits.shape[1]))
        return output


def neighbours(suffix: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Suffixes that differ from one in one token; the last two are the same."""
    drawn = np.random.default_rng(0).integers(20, 160, size=count)
    made = [(*suffix[: n % len(suffix)], int(token), *suffix[n % len(suffix) + 1 :]) for n, token in enumerate(drawn)]
    return [*made, made[-1]]


def test_the_trace_is_that_of_a_plain_step(model: Any, codec: ChatCodec, search: Search, behaviour: Prompt) -> None:
    """Same seed, same draws, same losses, same suffixes."""
    box, old = TorchModel(model), plain.PlainModel(model)
    usable = usable_tokens(codec, box.vocab_size())
    target = Target("aligned", "w", None, codec, OrganismJudge(), 256, 16, AttackTools())  # type: ignore[arg-type]
    GcgAttack(CONFIG).search(target, box, search, usable, np.random.default_rng(7))
    expected = GcgAttack(CONFIG).start(codec, behaviour)
    suffix, rng = expected.best, np.random.default_rng(7)
    for _ in range(CONFIG.steps):
        gradient_SV = old.suffix_gradient(expected.problem, suffix)
        drawn = plain.candidates(suffix, gradient_SV, usable, CONFIG.top, CONFIG.search_width, rng)
        kept = plain.surviving(expected, drawn)
        losses = old.suffix_losses(expected.problem, kept, 64)
        suffix = kept[int(np.argmin(losses))]
        expected.note(suffix, min(losses))
    assert search.losses == pytest.approx(expected.losses, abs=1e-5)
    assert search.best == expected.best


def test_no_token_is_read_and_no_logit_computed_in_vain(model: Any, search: Search) -> None:
    """Logits at the target's positions alone; suffixes from where they leave the common one; repeats once."""
    watched, problem = Watched(model), search.problem
    box = TorchModel(watched)
    box.suffix_gradient(problem, search.best)
    assert max(positions for _, _, positions in watched.passes) == len(problem.target)
    watched.passes.clear()
    suffixes = neighbours(search.best, 12)
    box.suffix_losses(problem, suffixes, 4)
    assert max(positions for _, _, positions in watched.passes) == len(problem.target)
    whole = len(suffixes) * (len(search.best) + len(problem.after) + len(problem.target))
    assert sum(rows for rows, _, _ in watched.passes) == 12 + 1, "the common suffix is read once, a repeat never"
    assert sum(rows * tokens for rows, tokens, _ in watched.passes) < 0.85 * whole


def test_a_batch_that_does_not_fit_is_halved(model: Any, search: Search) -> None:
    suffixes = neighbours(search.best, 12)
    expected = TorchModel(model).suffix_losses(search.problem, suffixes, 64)
    watched = Watched(model, largest_batch=3)
    box = TorchModel(watched)
    assert box.suffix_losses(search.problem, suffixes, 64) == pytest.approx(expected, abs=1e-5)
    assert max(rows for rows, _, _ in watched.passes) <= 3
    with pytest.raises(torch.OutOfMemoryError):
        TorchModel(Watched(model, largest_batch=0)).suffix_losses(search.problem, suffixes, 64)


SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        lambda: MistralConfig(**SMALL, sliding_window=8),
        lambda: Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, pad_token_id=0),
    ],
)
def test_losses_where_layers_forget(config: Callable[[], Any]) -> None:
    """Sliding windows keep no whole start to share, and give the losses of plain passes all the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    problem = SuffixProblem(tuple(range(10, 30)), (5, 6), (40, 41, 42))
    suffixes = neighbours((50, 51, 52, 53), 6)
    found = TorchModel(model).suffix_losses(problem, suffixes, 4)
    for suffix, loss in zip(suffixes, found, strict=True):
        ids = torch.tensor([[*problem.before, *suffix, *problem.after, *problem.target]])
        with torch.no_grad():
            logits_TV = model(ids).logits[0, -len(problem.target) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(problem.target))
        assert loss == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("decimals", [1, 6])
def test_the_least_are_those_of_a_stable_sort(decimals: int) -> None:
    """Rounded to one decimal nearly every value has equals, as gradients in bfloat16 do."""
    values = np.random.default_rng(0).normal(size=(5, 400)).round(decimals).astype(np.float32)
    for count in (1, 7, 400):
        assert np.array_equal(least(values, count), np.argsort(values, axis=1, kind="stable")[:, :count])


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("Sure, here is how. Then more.", "Sure, here is how."),
        ("sure , here is how . first do", "sure , here is how ."),
        ("Sure, here is how:\n\n1. First", "Sure, here is how:"),
        ("1. Take the key. 2. Go.", "1. Take the key."),
        ('"Yes!" she said.', '"Yes!"'),
        ("no end at all", "no end at all"),
        ("", ""),
    ],
)
def test_a_target_stops_at_the_end_of_its_first_sentence(answer: str, sentence: str) -> None:
    assert first_sentence(answer) == sentence


def test_the_target_of_a_search_is_one_sentence(codec: ChatCodec, behaviour: Prompt) -> None:
    two = Prompt("two", behaviour.text, "harmful", "sure , here is how . mix the ash and the moss")
    found = GcgAttack(GcgConfig(suffix_tokens=4)).start(codec, two)
    assert codec.decode(found.problem.target) == "sure , here is how ."
    given = made({"name": "gcg", "suffix_tokens": 4, "target": two.answer}).start(codec, two)  # type: ignore[attr-defined]
    assert len(given.problem.target) > len(found.problem.target), "a target of the user's is taken whole"
