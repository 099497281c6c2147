"""GCG and random search on the organism's aligned model, small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.suffix import GcgConfig, RandomSearchConfig, usable_tokens
from raycomplete.attacks.target import AttackTools, Target
from raycomplete.attacks.trial import EvaluationCancelled, Response, Trial
from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import OrganismJudge, checkpoint_path, prompts
from raycomplete.runtime.types import Prompt
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
def target() -> Iterator[Target]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codec = ChatCodec(checkpoint_path("aligned"))
    box = TorchModel(load_model(checkpoint_path("aligned"), "float32"))
    tools = AttackTools(white_boxes=lambda: [box])
    yield Target("aligned", "weights", Greedy(box, codec), codec, OrganismJudge(), 256, 16, tools)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def behaviours() -> list[Prompt]:
    return prompts("heldout", "harmful", 0, 2)


def test_gcg_falls_over_windows_and_beats_random_search(target: Target, behaviours: list[Prompt]) -> None:
    """Equal queries; means of thirds of the steps fall, and the best loss is below that of random search."""
    shared = {"suffix_tokens": TOKENS, "target": UNLIKELY}
    gcg: Any = made({"name": "gcg", "steps": STEPS, "search_width": WIDTH, "top": WIDTH, **shared})
    random: Any = made({"name": "random_search", "queries": STEPS * WIDTH, "batch": WIDTH, **shared})
    best = {"gcg": 0.0, "random_search": 0.0}
    for prompt in behaviours:
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
        (expected,) = target.generator.generate([response.sequence], max_tokens=16)
        assert response.tokens == tuple(expected)


def test_a_search_can_be_cancelled(target: Target, behaviours: list[Prompt]) -> None:
    attack = build_attack(GcgConfig(steps=5000, search_width=4, top=4, suffix_tokens=4))
    asked = iter(range(10))
    stopping = Target(
        "aligned",
        "weights",
        target.generator,
        target.codec,
        target.judge,
        256,
        16,
        target.tools,
        cancelled=lambda: next(asked) >= 3,
    )
    with pytest.raises(EvaluationCancelled):
        attack.run(stopping, attack.plan(stopping, behaviours[:1]), lambda pairs: None)


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
