"""Best-of-N: how a prompt is augmented, when it stops, and what a batch may not change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from raycomplete.attacks.sampling import augmented
from raycomplete.attacks.target import AttackTools, Target
from raycomplete.attacks.trial import FIRST_COMPLIED, UNUSED_WORDINGS
from raycomplete.evaluation.runner import EvaluationSets
from tests.attacks.scripted import COMPLY, REFUSE, run

TEXT = " ".join(["the quick brown foxes jump over seven lazy sleeping dogs"] * 40)


def test_letters_change_as_often_as_the_authors_say() -> None:
    """With strength .4: case and words with .632, noise with .064, words of up to three letters never shuffled."""
    found = augmented(TEXT, 0.4, random.Random(0))
    assert len(found) == len(TEXT)
    noised = sum(new.lower() not in word for new, word in _aligned(found, TEXT)) / len(TEXT)
    upper = [letter.isupper() for letter in found if letter.isalpha()]
    assert sum(upper) / len(upper) == pytest.approx(0.632, abs=0.03)
    assert noised == pytest.approx(0.064, abs=0.02)
    quiet = augmented(TEXT, 1e-18, random.Random(0))
    assert quiet == TEXT
    words = augmented(TEXT, 0.4, random.Random(1)).split()
    assert words != TEXT.split()


def _aligned(found: str, text: str) -> list[tuple[str, str]]:
    """Each character beside the word that it stood in, since words are shuffled inside only."""
    places: list[tuple[str, str]] = []
    position = 0
    for word in text.split():
        places += [(letter, word) for letter in found[position : position + len(word)]]
        position += len(word) + 1
        if position <= len(text):
            places.append((found[position - 1], " "))
    return places


def test_it_stops_at_the_first_answer(target: Target, sets: EvaluationSets, model: Any) -> None:
    calls: list[str] = []

    def script(prompt: str, _: str) -> str:
        calls.append(prompt)
        return COMPLY if len(calls) % 5 == 0 else REFUSE

    answering = replace(target, generator=model(script), tools=AttackTools())
    found = run(answering, {"name": "best_of_n", "samples": 40, "batch": 1}, sets)
    assert [response.stats["queries"] for _, response in found] == [5, 5, 5, 5]
    assert {response.stats[FIRST_COMPLIED] for _, response in found} == {0.0}
    assert [answering.codec.decode(response.tokens) for _, response in found] == [COMPLY] * 4
    calls.clear()
    refusing = replace(target, generator=model(REFUSE), tools=AttackTools())
    assert {response.stats["queries"] for _, response in run(refusing, {"name": "best_of_n", "samples": 7}, sets)} == {
        7
    }


def test_the_size_of_a_batch_changes_nothing(target: Target, sets: EvaluationSets) -> None:
    """Prompts and seeds of a sample are the same however many are asked at once."""
    asked: dict[int, dict[int, tuple[int, ...]]] = {1: {}, 3: {}}

    class Drawing:
        def __init__(self, batch: int) -> None:
            self.batch = batch

        def generate(self, sequences: Sequence[Any], *, seed: int, **_: Any) -> list[list[int]]:
            asked[self.batch].update({seed + place: tuple(ids) for place, ids in enumerate(sequences)})
            return [[] for _ in sequences]

    for batch in asked:
        drawing = replace(target, generator=Drawing(batch), tools=AttackTools())
        run(drawing, {"name": "best_of_n", "samples": 7, "batch": batch}, sets)
    assert asked[1] == asked[3]
    assert len(asked[1]) == 7 * len(sets.harmful)
    assert len(set(asked[1].values())) > 20


def test_augmented_prompts_that_do_not_fit_are_asked_plainly(target: Target, sets: EvaluationSets) -> None:
    class Splitting:
        """A token for each letter of an augmented prompt, as a vocabulary of whole words nearly does."""

        frame = None

        def __init__(self, codec: Any) -> None:
            self.encode_prompt, self.decode, self.eos_ids = codec.encode_prompt, codec.decode, codec.eos_ids

        def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
            return [[1] * 500 for _ in texts]

    lengths: set[int] = set()

    class Measuring:
        def generate(self, sequences: Sequence[Any], **_: Any) -> list[list[int]]:
            lengths.update(map(len, sequences))
            return [[] for _ in sequences]

    splitting = replace(target, codec=Splitting(target.codec), generator=Measuring(), tools=AttackTools())
    found = run(splitting, {"name": "best_of_n", "samples": 2}, sets)
    assert max(lengths) < 20
    assert {response.stats[UNUSED_WORDINGS] for _, response in found} == {2}
    found = run(replace(splitting, codec=target.codec), {"name": "best_of_n", "samples": 2}, sets)
    assert {response.stats[UNUSED_WORDINGS] for _, response in found} == {0}
