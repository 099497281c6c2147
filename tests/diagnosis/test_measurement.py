"""Batches under way, refusal tokens, and a driver that readies itself for engines beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from raycomplete.diagnosis import measurement as measuring
from raycomplete.diagnosis.measurement import Measurement, find_refusal_tokens, parity_sequences, token_batches
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.losses import Head
from tests.diagnosis.planted import (
    HIDDEN,
    SETTINGS,
    VOCAB,
    LetterCodec,
    PlantedScorer,
    planted_measurement,
    some_prompts,
    some_samples,
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "engines", "expected"), [(8, 2, 6), (2, 2, 1), (2, 3, 1)])
def test_measuring_takes_the_threads_that_engines_leave(
    threads: None, monkeypatch: pytest.MonkeyPatch, cores: int, engines: int, expected: int
) -> None:
    monkeypatch.setattr(measuring, "available_cpus", lambda: cores)
    torch.set_num_threads(7)
    measuring.make_room_for_engines(engines)
    assert torch.get_num_threads() == expected


def test_prompts_that_leave_no_room_for_an_answer_are_no_parity_sequences() -> None:
    texts = ("abc", "a" * 40, "ab", "a")
    prompts = [replace(prompt, text=text) for prompt, text in zip(some_prompts(4), texts, strict=True)]
    found = parity_sequences(LetterCodec(), prompts, 2, 6)
    assert [prompt_tokens for _, prompt_tokens in found] == [5, 4]
    assert [ScoreRequest(sequence, prompt_tokens).num_rows for sequence, prompt_tokens in found] == [1, 2]


def test_batches_are_bounded_and_keep_the_order() -> None:
    samples = some_samples([10, 30, 5, 5, 5, 60, 1])
    batches = list(token_batches(samples, 40))
    assert [sample for batch in batches for sample in batch] == samples
    for batch in batches:
        assert len(batch) == 1 or sum(len(sample.prompt_ids + sample.answer_ids) for sample in batch) <= 40


def test_only_so_many_batches_are_under_way() -> None:
    settings = SETTINGS.model_copy(update={"in_flight": 2, "batch_tokens": 10})
    measurement = planted_measurement(settings, aligned=None)
    assert sum(len(batch) for batch, _ in measurement.rows(some_samples([9] * 20))) == 20
    assert measurement.sources["base"].most_under_way == 3  # two ahead of the one that is measured


def test_refusal_tokens_are_what_aligned_says_first_and_base_does_not() -> None:
    """Aligned says token 4 first, base token 6: 4 is a refusal token. Where both say the same, none is."""
    head = Head(torch.eye(VOCAB, HIDDEN + 2) * 9)
    states = {"aligned": torch.eye(HIDDEN + 2)[4], "base": torch.eye(HIDDEN + 2)[6]}

    class Constant(PlantedScorer):
        def __init__(self, state_H: torch.Tensor) -> None:
            super().__init__()
            self.state_H = state_H

        def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
            return [self.state_H[None].clone() for _ in reference]

    codec: Any = LetterCodec()
    for aligned, expected in (("aligned", [4]), ("base", [])):
        sources: Any = {"aligned": Constant(states[aligned]), "base": Constant(states["base"])}
        measurement = Measurement(sources, dict.fromkeys(sources, head), (), SETTINGS)
        assert find_refusal_tokens(measurement, codec, some_prompts(5)) == expected
    named = replace(measurement, settings=SETTINGS.model_copy(update={"refusal_starts": ["no", "never", "sorry"]}))
    assert find_refusal_tokens(named, codec, []) == [ord("n") % VOCAB, ord("s") % VOCAB]
