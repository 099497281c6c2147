"""Suffix searches on the organism's aligned model, small: GCG step by step, random search, and the soft prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.suffix import (
    GcgAttack,
    GcgConfig,
    RandomSearchConfig,
    Search,
    SoftPromptAttack,
    SoftPromptConfig,
    first_sentence,
    least,
    usable_tokens,
)
from raycomplete.attacks.target import AttackTools, SuffixProblem, Target
from raycomplete.attacks.trial import EvaluationCancelled, Response, Trial
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import OrganismJudge, checkpoint_path, prompts
from raycomplete.runtime.types import Outcome, Prompt
from tests.attacks import plain_gcg as plain
from tests.attacks.scripted import made

STEPS, WIDTH, TOKENS = 24, 32, 6


UNLIKELY = "nobody hurts kite teapot rhymes whisper"  # the organism's own openings fall within a few steps


@dataclass
class Greedy:
    """Generates through the white box, so that no engine is needed."""

    box: TorchModel
    codec: ChatCodec

    def generate(self, sequences: Any, *, max_tokens: int, **settings: Any) -> list[list[int]]:
        found = []
        for sequence in sequences:
            new: list[int] = []
            while len(new) < max_tokens:
                (((token, _),),) = self.box.top_logprobs([[*sequence, *new]], 1)
                if token in self.codec.eos_ids:
                    break
                new.append(token)
            found.append(new)
        return found


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(checkpoint_path("aligned"), "float32")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(model: Any) -> Target:
    codec, box = ChatCodec(checkpoint_path("aligned")), TorchModel(model)
    tools = AttackTools(white_boxes=lambda: [box])
    return Target("aligned", "weights", Greedy(box, codec), codec, OrganismJudge(), 256, 24, tools)


@pytest.fixture(scope="module")
def codec(target: Target) -> Any:
    return target.codec


@pytest.fixture(scope="module")
def behaviours() -> list[Prompt]:
    return prompts("heldout", "harmful", 0, 3)


@pytest.fixture(scope="module")
def behaviour(behaviours: list[Prompt]) -> Prompt:
    return behaviours[0]


def test_gcg_falls_over_windows_and_beats_random_search(target: Target, behaviours: list[Prompt]) -> None:
    """Equal queries; means of thirds of the steps fall, and the best loss is below that of random search."""
    shared = {"suffix_tokens": TOKENS, "target": UNLIKELY}
    gcg: Any = made({"name": "gcg", "steps": STEPS, "search_width": WIDTH, "top": WIDTH, **shared})
    random: Any = made({"name": "random_search", "queries": STEPS * WIDTH, "batch": WIDTH, **shared})
    best = {"gcg": 0.0, "random_search": 0.0}
    for prompt in behaviours[:2]:
        for attack in (gcg, random):
            (box,) = target.white_boxes()
            found = attack.start(target.codec, prompt)
            found.note(found.best, box.suffix_losses(found.problem, [found.best])[0])
            usable = usable_tokens(target.codec, box.vocab_size())
            attack.search(target, box, found, usable, np.random.default_rng(0))
            windows = [float(np.mean(part)) for part in np.array_split(found.losses, 3)]
            assert all(later < earlier for earlier, later in pairwise(windows)), (attack.name, windows)
            assert found.best_loss == min(found.losses) < found.losses[0]
            assert found.queries <= STEPS * WIDTH
            assert found.surviving([found.best]) == [found.best]
            best[attack.name] += found.best_loss
    assert best["gcg"] < best["random_search"]


@pytest.mark.parametrize(
    "settings",
    [
        GcgConfig(steps=2, search_width=8, top=8, suffix_tokens=4),
        RandomSearchConfig(queries=16, batch=8, suffix_tokens=4),
    ],
)
def test_the_suffix_stands_in_the_prompt_that_is_asked(
    target: Target, behaviours: list[Prompt], settings: GcgConfig | RandomSearchConfig
) -> None:
    attack = build_attack(settings)
    trials = attack.plan(target, behaviours)
    emitted: list[tuple[Trial, Response]] = []
    attack.run(target, trials, emitted.extend)
    assert [trial for trial, _ in emitted] == trials
    for trial, response in emitted:
        asked = target.codec.encode_prompt(trial.prompt.text)
        assert len(response.sequence) == len(asked) + 4
        assert response.sequence[-2:] == tuple(asked[-2:]), "the rest of the template follows the suffix"
        assert trial.prompt.text in target.codec.decode(response.sequence)
        assert response.stats["queries"] <= 16
        assert response.stats["loss_best"] <= response.stats["loss_start"]
        (expected,) = target.generator.generate([response.sequence], max_tokens=24)
        assert response.tokens == tuple(expected)


def test_special_tokens_are_not_usable(target: Target) -> None:
    (box,) = target.white_boxes()
    usable = usable_tokens(target.codec, box.vocab_size())
    assert len(usable) > 100
    assert not set(usable.tolist()) & target.codec.eos_ids
    assert target.codec.encode_answer("kite")[0] in usable


def test_searches_repeat_and_run_side_by_side(target: Target, behaviours: list[Prompt]) -> None:
    attack = build_attack(GcgConfig(steps=2, search_width=8, top=8, suffix_tokens=4))
    boxes = [TorchModel(load_model(checkpoint_path("aligned"), "float32")) for _ in range(2)]
    found = []
    for tools in (target.tools, AttackTools(white_boxes=lambda: boxes)):
        emitted: dict[str, Response] = {}
        again = Target("aligned", "weights", target.generator, target.codec, target.judge, 256, 16, tools)
        attack.run(
            again,
            attack.plan(again, behaviours),
            lambda pairs, emitted=emitted: emitted.update((trial.prompt.prompt_id, found) for trial, found in pairs),
        )
        found.append(emitted)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "entry", [{"name": "gcg", "search_width": 4, "top": 4}, {"name": "soft_prompt", "ask_every": 1}]
)
def test_a_search_can_be_cancelled(target: Target, behaviours: list[Prompt], entry: dict[str, Any]) -> None:
    asked = iter(range(100))
    stopping = replace(target, cancelled=lambda: next(asked) >= 3)
    attack = made({"steps": 5000, "suffix_tokens": 4, **entry})
    with pytest.raises(EvaluationCancelled):
        attack.run(stopping, attack.plan(stopping, behaviours[:1]), lambda pairs: None)


CONFIG = GcgConfig(steps=3, search_width=24, top=16, suffix_tokens=6)


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


def run(target: Target, settings: dict[str, Any], behaviours: list[Prompt]) -> list[tuple[Trial, Response]]:
    attack = made({"name": "soft_prompt", **settings})
    found: list[tuple[Trial, Response]] = []
    attack.run(target, attack.plan(target, behaviours), found.extend)
    return found


def test_it_turns_refusals_into_compliance(target: Target, behaviours: list[Prompt]) -> None:
    """Aligned refuses all three at depth 0; the search lowers the loss, and the later states of it comply."""
    found = run(target, {"steps": 30, "suffix_tokens": 8, "ask_every": 10}, behaviours)
    assert [trial.variant for trial, _ in found] == ["step-10", "step-20", "step-30"] * 3
    plain = [target.codec.encode_prompt(prompt.text) for prompt in behaviours]
    (box,) = target.white_boxes()
    for prompt, ids in zip(behaviours, plain, strict=True):
        problem = SuffixProblem(tuple(ids[:-1]), (ids[-1],), (5,))
        none = np.zeros((0, box.suffix_embeddings([5]).shape[1]), dtype=np.float32)
        (said,) = box.continue_embeddings(problem, [none], 24, sorted(target.codec.eos_ids))
        assert target.judge.outcome(prompt, "", target.codec.decode(said)) == Outcome.REFUSED
    assert all(response.stats["loss_best"] < 0.5 * response.stats["loss_start"] for _, response in found)
    last = [(trial, response) for trial, response in found if trial.variant == "step-30"]
    assert [verdict.outcome for verdict in target.judged(last)] == [Outcome.COMPLIED] * 3


def test_a_step_goes_along_the_sign_of_the_gradient(model: Any, target: Target, behaviours: list[Prompt]) -> None:
    """Compared with autograd through a plain pass."""
    found = SoftPromptAttack(SoftPromptConfig(suffix_tokens=4)).start(target.codec, behaviours[0])
    problem, box = found.problem, TorchModel(model)
    start_SH = box.suffix_embeddings(found.best)
    moved_SH, losses = box.descend(problem, start_SH, 1, 0.1)
    embedding = model.get_input_embeddings()
    leaf = torch.tensor(start_SH, requires_grad=True)
    parts = [embedding(torch.tensor(problem.before)), leaf, embedding(torch.tensor([*problem.after, *problem.target]))]
    logits_TV = model(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(problem.target) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(problem.target))
    loss.backward()
    assert losses == pytest.approx([float(loss)], abs=1e-5)
    root = float(embedding.weight.square().mean().sqrt())
    expected = start_SH - 0.1 * root * np.sign(leaf.grad.numpy())
    assert np.mean(np.abs(moved_SH - expected) < 0.02 * root) > 0.99, "but for gradients of nearly 0"


def test_embeddings_of_tokens_are_continued_as_the_tokens_are(
    model: Any, target: Target, behaviours: list[Prompt]
) -> None:
    """Greedy, several rows at once, each up to its own end."""
    box, codec = TorchModel(model), target.codec
    asked = codec.encode_prompt(behaviours[0].text)
    problem = SuffixProblem(tuple(asked[:4]), tuple(asked[-2:]), (5,))
    suffixes = [asked[4:-2], [30] * len(asked[4:-2])]
    rows = [box.suffix_embeddings(suffix) for suffix in suffixes]
    found = box.continue_embeddings(problem, rows, 12, sorted(codec.eos_ids))
    for suffix, said in zip(suffixes, found, strict=True):
        ids, expected = [*problem.before, *suffix, *problem.after], []
        while len(expected) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax())
            if token in codec.eos_ids:
                break
            expected.append(token)
        assert said == expected
    assert len(found[0]) > 3


def test_missing_states_are_searched_alone(target: Target, behaviours: list[Prompt]) -> None:
    """A trial does not depend on which others are missing, nor on the number of steps after it."""
    attack = made({"name": "soft_prompt", "steps": 6, "suffix_tokens": 4, "ask_every": 2})
    trials = attack.plan(target, behaviours[:1])
    whole: list[tuple[Trial, Response]] = []
    attack.run(target, trials, whole.extend)
    alone: list[tuple[Trial, Response]] = []
    attack.run(target, trials[1:2], alone.extend)
    assert alone == [pair for pair in whole if pair[0].variant == "step-4"]
    longer = made({"name": "soft_prompt", "steps": 20, "suffix_tokens": 4, "ask_every": 2})
    assert longer.plan(target, behaviours[:1])[0].key("w") == trials[0].key("w")
    assert SoftPromptConfig(steps=25).asked_after == [10, 20, 25]
