"""Batches, rows and tokens of one partition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.diagnosis.engines import find_refusal_tokens
from raycomplete.diagnosis.partitions import Walk, measure_partition, token_batches
from raycomplete.diagnosis.rows import METRICS, DiagnosisSettings, diagnose_rows
from raycomplete.losses import Head
from tests.commands.planted import (
    HIDDEN,
    SETTINGS,
    VOCAB,
    LetterCodec,
    PlantedScorer,
    normal,
    planted_walk,
    some_prompts,
    some_samples,
)


def test_batches_are_bounded_and_keep_the_order() -> None:
    samples = some_samples([10, 30, 5, 5, 5, 60, 1])
    batches = list(token_batches(samples, 40))
    assert [sample for batch in batches for sample in batch] == samples
    for batch in batches:
        assert len(batch) == 1 or sum(len(sample.prompt_ids + sample.answer_ids) for sample in batch) <= 40


def test_only_so_many_batches_are_under_way() -> None:
    settings = SETTINGS.model_copy(update={"in_flight": 2, "batch_tokens": 10})
    walk = planted_walk(settings, aligned=None)
    assert sum(len(batch) for batch, _ in walk.rows(some_samples([9] * 20))) == 20
    assert walk.sources["base"].most_under_way == 3  # two ahead of the one that is walked


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_a_partition_holds_the_rows_and_tokens_of_every_sample(batch_tokens: int) -> None:
    walk = planted_walk(SETTINGS.model_copy(update={"batch_tokens": batch_tokens}), aligned=normal(5, 6, HIDDEN))
    samples = some_samples([3, 20, 11, 8])
    rows, tokens = measure_partition(walk, samples)
    tokens = {name: np.asarray(values, dtype=object if name == "context" else None) for name, values in tokens.items()}
    expected = []
    for _, hidden in walk.hidden_states(samples):
        head = walk.heads["base"]
        config = DiagnosisSettings(SETTINGS.tau, SETTINGS.margin, SETTINGS.kappa)
        policies = {"aligned": (hidden["aligned"], head)}
        expected.append(diagnose_rows(policies, hidden["base"], head, (3,), config)["aligned"])
    values_NM = torch.cat([item.values_NM for item in expected]).numpy()
    assert rows["token_id"].tolist() == [token for sample in samples for token in sample.answer_ids]
    assert rows["position"].tolist() == [place for sample in samples for place in range(len(sample.answer_ids))]
    assert rows["prompt"].tolist() == [i for i, sample in enumerate(samples) for _ in sample.answer_ids]
    assert np.allclose(np.stack([rows[name] for name in METRICS], 1), values_NM, atol=1e-5)
    # The table of tokens splits the mass of the rows by band and token, and loses none.
    band_N = np.digitize(rows["position"], [1, 4, 8, 16])
    for band in range(5):
        mass = rows["base_favored_mass"][band_N == band].sum()
        assert tokens["mass"][tokens["band"] == band].sum() == pytest.approx(mass, rel=1e-5)
    assert tokens["count"].sum() == rows["base_favored_count"].sum() > 0
    for prompt, position, token, context in zip(
        tokens["prompt"], tokens["position"], tokens["token_id"], tokens["context"], strict=True
    ):
        assert list(context) == list(samples[prompt].answer_ids[max(0, position - 12) : position])
        assert 0 <= token < VOCAB


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
        walk = Walk(sources, dict.fromkeys(sources, head), (), SETTINGS)
        assert find_refusal_tokens(walk, codec, some_prompts(5)) == expected
    named = replace(walk, settings=SETTINGS.model_copy(update={"refusal_starts": ["no", "never", "sorry"]}))
    assert find_refusal_tokens(named, codec, []) == [ord("n") % VOCAB, ord("s") % VOCAB]
