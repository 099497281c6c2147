"""Batches, rows and tokens of one partition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.diagnosis.partitions import measure_partition, merged_tokens, position_bands
from raycomplete.diagnosis.rows import METRICS, DiagnosisSettings, Opening, diagnose_rows
from tests.diagnosis.planted import (
    HIDDEN,
    SETTINGS,
    VOCAB,
    normal,
    planted_measurement,
    some_samples,
)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_a_partition_holds_the_rows_and_tokens_of_every_sample(batch_tokens: int) -> None:
    measurement = planted_measurement(
        SETTINGS.model_copy(update={"batch_tokens": batch_tokens}), aligned=normal(5, 6, HIDDEN)
    )
    samples = some_samples([3, 20, 11, 8])
    rows, tokens = measure_partition(measurement, samples)
    tokens = {name: np.asarray(values, dtype=object if name == "context" else None) for name, values in tokens.items()}
    expected = []
    for batch, hidden in measurement.hidden_states(samples):
        head = measurement.heads["base"]
        config = DiagnosisSettings(SETTINGS.tau, SETTINGS.margin, SETTINGS.kappa)
        policies = {"aligned": (hidden["aligned"], head)}
        lengths = torch.tensor([len(sample.answer_ids) for sample in batch])
        opening = Opening.of_rows(hidden["aligned"], head, torch.arange(len(batch)).repeat_interleave(lengths))
        expected.append(diagnose_rows(policies, hidden["base"], head, opening, (3,), config)["aligned"])
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


def test_bands_cover_every_position_once() -> None:
    assert position_bands(1) == [(0, 0)]
    assert position_bands(20) == [(0, 0), (1, 3), (4, 7), (8, 15), (16, 19)]
    for size in (2, 4, 5, 100, 2048):
        covered = [position for low, high in position_bands(size) for position in range(low, high + 1)]
        assert covered == list(range(size))


def test_tokens_of_partitions_are_summed_and_the_strongest_occurrence_stays() -> None:
    def part(*rows: tuple[int, int, int, float, float, str]) -> dict[str, Any]:
        names = ("role", "band", "token_id", "mass", "base_probability", "context")
        columns = {name: np.asarray(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
        return columns | {"policy_mass": columns["mass"] / 2, "count": np.full(len(rows), 3)}

    first = part((0, 1, 9, 0.25, 0.2, "a"), (1, 0, 4, 0.5, 0.5, "b"))
    second = part((0, 1, 9, 0.5, 0.3, "c"), (0, 1, 3, 0.125, 0.1, "d"), (1, 0, 4, 0.25, 0.5, "e"))
    found = merged_tokens([first, {}, second])
    assert found["role"].tolist() == [0, 0, 1]
    assert found["token_id"].tolist() == [3, 9, 4]
    assert found["mass"].tolist() == [0.125, 0.75, 0.75]
    assert found["policy_mass"].tolist() == [0.0625, 0.375, 0.375]
    assert found["count"].tolist() == [3, 6, 6]
    assert found["context"].tolist() == ["d", "c", "b"], "of equally strong ones the first"
    assert merged_tokens([{}]) == {}
