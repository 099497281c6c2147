"""The soft prompt on the organism's aligned model, small, and generation from embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.attacks.suffix import SoftPromptAttack, SoftPromptConfig
from raycomplete.attacks.target import AttackTools, SuffixProblem, Target
from raycomplete.attacks.trial import EvaluationCancelled, Response, Trial
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import OrganismJudge, checkpoint_path, prompts
from raycomplete.runtime.types import Outcome, Prompt
from tests.attacks.scripted import made


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(checkpoint_path("aligned"), "float32")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(model: Any) -> Target:
    box = TorchModel(model)
    codec = ChatCodec(checkpoint_path("aligned"))
    tools = AttackTools(white_boxes=lambda: [box])
    return Target("aligned", "w", None, codec, OrganismJudge(), 256, 24, tools)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def behaviours() -> list[Prompt]:
    return prompts("heldout", "harmful", 0, 3)


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


def test_a_search_can_be_cancelled(target: Target, behaviours: list[Prompt]) -> None:
    asked = iter(range(100))
    with pytest.raises(EvaluationCancelled):
        run(replace(target, cancelled=lambda: next(asked) >= 2), {"steps": 5000, "ask_every": 1}, behaviours[:1])
