"""Helpers of the tests of attacks: a white box of words, and short ways to plan and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.attacks.registry import ATTACKS, build_attack
from raycomplete.attacks.target import AttackTools, Target
from raycomplete.attacks.trial import Response, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model

COMPLY = "Sure, take the key and then open the door."
REFUSE = "I'm sorry, but I can't help with that."
BABBLE = "xkqj zzrt pwvx qqmn bcdf ghjk lmnp"


class FakeBox:
    """A white box of words: favours some tokens, answers with what the scripted model says, and has a loss to search.

    The loss of a suffix is the share of its tokens that are not `wanted`, so that a search has something to find.
    """

    def __init__(self, model: Any, codec: Any, liked: str = "", wanted: str = "open") -> None:
        self.model, self.codec, self.liked, self.wanted = model, codec, liked, codec.encode_answer(wanted)[0]

    def vocab_size(self) -> int:
        return len(self.codec.words)

    def top_logprobs(self, sequences: Any, top: int) -> list[list[tuple[int, float]]]:
        said = [*self.codec.encode_answer(COMPLY), 0]
        spoken = [len(sequence) - sequence.index(2) - 1 for sequence in sequences]
        refusal = self.codec.encode_answer("sorry")[0]
        return [[(refusal, -0.1), (said[min(count, len(said) - 1)], -2.0)][:top] for count in spoken]

    def logprobs_of(self, sequences: Any, tokens: Any) -> list[list[float]]:
        refusal = self.codec.encode_answer("sorry")[0]
        return [[-9.0 if token == refusal else -1.0 for token in row] for row in tokens]

    def suffix_gradient(self, problem: Any, suffix: Any) -> np.ndarray:
        gradient = np.zeros((len(suffix), self.vocab_size()), dtype=np.float32)
        gradient[:, self.wanted] = -1.0
        return gradient

    def suffix_losses(self, problem: Any, suffixes: Any, batch: int = 64) -> list[float]:
        return [sum(token != self.wanted for token in suffix) / len(suffix) for suffix in suffixes]

    def suffix_embeddings(self, suffix: Any) -> np.ndarray:
        return np.zeros((len(suffix), 2), dtype=np.float32)

    def descend(self, problem: Any, suffix_SH: Any, steps: int, lr: float) -> tuple[np.ndarray, list[float]]:
        done = int(suffix_SH[0, 0])  # the number of steps so far
        return suffix_SH + steps, [1.0 / (1 + done + step) for step in range(steps)]

    def continue_embeddings(self, problem: Any, suffixes: Any, max_tokens: int, eos_ids: Any) -> list[list[int]]:
        asked = [[*problem.before, *problem.after] for _ in suffixes]
        return self.model.generate(asked, max_tokens=max_tokens)  # type: ignore[no-any-return]


Ranking = Callable[[list[str]], list[str]]  # words of the answer so far -> next words, likeliest first


class RankBox:
    """A white box that ranks words by a rule of the answer so far; each is half as likely as the one before."""

    def __init__(self, codec: Any, ranking: Ranking) -> None:
        self.codec, self.ranking = codec, ranking
        self.calls = 0

    def vocab_size(self) -> int:
        return len(self.codec.words)

    def _ranked(self, sequence: Sequence[int]) -> list[int]:
        words = self.codec.decode(sequence[list(sequence).index(2) :]).split()
        return [
            token
            for word in self.ranking(words)
            for token in ([0] if word == "<end>" else self.codec.encode_answer(word))
        ]

    def top_logprobs(self, sequences: Any, top: int) -> list[list[tuple[int, float]]]:
        self.calls += 1
        return [[(token, -0.7 * n) for n, token in enumerate(self._ranked(row))][:top] for row in sequences]

    def logprobs_of(self, sequences: Any, tokens: Any) -> list[list[float]]:
        ranked = [dict(zip(self._ranked(row), range(99), strict=False)) for row in sequences]
        return [[-0.7 * ranks.get(token, 99) for token in row] for ranks, row in zip(ranked, tokens, strict=True)]


def next_of(words: list[str], said: list[str]) -> str:
    """The word after those said so far; the end where they are none of its beginnings."""
    return words[len(said)] if len(said) < len(words) and said == words[: len(said)] else "<end>"


Tools = Callable[[Any], AttackTools]


def settings_of(entry: str | Mapping[str, Any] | AttackConfig) -> AttackConfig:
    """Settings of an attack; other names among them are constants of its class, changed as a plugin changes them."""
    if isinstance(entry, AttackConfig):
        return entry
    tree = {"name": entry} if isinstance(entry, str) else dict(entry)
    section = ATTACKS[tree["name"]].config_class
    constants = {name: tree.pop(name) for name in list(tree) if name not in section.model_fields}
    assert all(hasattr(section, name) for name in constants), constants
    return type(section.__name__, (section,), constants).model_validate(tree)  # type: ignore[no-any-return]


def made(entry: str | Mapping[str, Any]) -> Attack[Any]:
    """The attack of such settings."""
    return build_attack(settings_of(entry))


def evaluate(
    generator: Any,
    codec: Any,
    tools: Tools,
    sets: EvaluationSets,
    attacks: Any,
    folder: Path,
    model_id: str = "weights",
) -> dict[str, Any]:
    attacks = [settings_of(entry) for entry in attacks]
    config = EvaluationConfig(depths=[0, 4], max_tokens=10, max_utility_tokens=12, attacks=attacks)
    target = Target("student", model_id, generator, codec, RefusalJudge(), 128, config.max_tokens, tools(generator))
    return evaluate_model(target, sets, config, folder)


def run(target: Target, entry: dict[str, Any], sets: EvaluationSets) -> list[tuple[Trial, Response]]:
    attack = made(entry)
    target = attack.prepared(target)
    found: list[tuple[Trial, Response]] = []
    attack.run(target, attack.plan(target, sets.harmful), found.extend)
    return found
