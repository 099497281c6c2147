"""Responses that are read, groups under way, batches on disk, refusal tokens, and a driver beside engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.config import DiagnoseConfig, map_paths
from raycomplete.diagnosis import measurement as measuring
from raycomplete.diagnosis.measurement import Batch, Measurement, find_refusal_tokens, measure_samples, parity_sequences
from raycomplete.diagnosis.rows import METRICS, Opening, diagnose_rows
from raycomplete.diagnosis.samples import DiagnosisSample, batch_samples, read_prompts
from raycomplete.diagnosis.statistics import _tokens_of
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.losses import Head
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt
from tests.diagnosis.planted import (
    HIDDEN,
    VOCAB,
    LetterCodec,
    PlantedScorer,
    a_config,
    a_run,
    normal,
    planted_measurement,
    some_prompts,
    some_samples,
)


@pytest.mark.parametrize(("cores", "engines", "expected"), [(8, 2, 6), (2, 3, 1)])
def test_measuring_takes_the_threads_that_engines_leave(
    monkeypatch: pytest.MonkeyPatch, cores: int, engines: int, expected: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(measuring, "available_cpus", lambda: cores)
    try:
        measuring.make_room_for_engines(engines)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_prompts_that_leave_no_room_for_an_answer_are_no_parity_sequences() -> None:
    texts = ("abc", "a" * 40, "ab", "a")
    prompts = [replace(prompt, text=text) for prompt, text in zip(some_prompts(4), texts, strict=True)]
    codec: Any = LetterCodec()
    found = parity_sequences(codec, prompts, 2, 6)
    assert [ScoreRequest(sequence, prompt_tokens).num_rows for sequence, prompt_tokens in found] == [1, 2]


def test_groups_are_bounded_keep_the_order_and_few_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BATCH_TOKENS", 40)
    samples = some_samples([10, 30, 5, 5, 5, 60, 1] * 3)
    measurement = planted_measurement(aligned=None)
    groups = [group for group, _ in measurement.rows(samples)]
    assert [sample for group in groups for sample in group] == samples
    for group in groups:
        assert len(group) == 1 or sum(len(sample.prompt_ids + sample.answer_ids) for sample in group) <= 40
    base: Any = measurement.sources["base"]
    assert base.most_under_way == measuring.IN_FLIGHT + 1


@pytest.mark.parametrize("group_tokens", [1, 40, 4096])
def test_a_batch_holds_the_rows_and_tokens_of_every_sample(
    group_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "BATCH_TOKENS", group_tokens)
    measurement = planted_measurement(aligned=normal(5, 6, HIDDEN))
    samples = some_samples([3, 20, 11, 8])
    ids = [sample.prompt_id for sample in samples]
    Batch(measure_samples(measurement, samples), {"measured_ids": ids}).write(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_mode & 0o077 == 0
    batch = Batch.read(tmp_path / "x.npz")
    assert batch is not None
    expected = []
    for group, hidden in measurement.hidden_states(samples):
        head = measurement.heads["base"]
        lengths = torch.tensor([len(sample.answer_ids) for sample in group])
        opening = Opening.of_rows(hidden["aligned"], head, torch.arange(len(group)).repeat_interleave(lengths))
        policies = {"aligned": (hidden["aligned"], head)}
        rows = diagnose_rows(policies, hidden["base"], head, opening, (3,), measuring.SETTINGS)
        expected.append(rows["aligned"].values_NM)
    values = batch.values_of(0)
    assert [len(values_TM) for values_TM in values] == [3, 20, 11, 8]
    assert np.allclose(np.concatenate(values), torch.cat(expected).numpy(), atol=1e-5)
    assert np.split(batch.arrays["token_N"], [3, 23, 34])[1].tolist() == list(samples[1].answer_ids)
    # The table of tokens splits the mass of the rows by band and token, and loses none.
    found, mass = _tokens_of([batch, batch]), METRICS.index("base_favored_mass")
    for band, (low, high) in enumerate([(0, 1), (1, 4), (4, 8), (8, 16), (16, 99)]):
        whole = 2 * sum(values_TM[low:high, mass].sum() for values_TM in values)
        assert sum(item["mass"] for item in found.get((0, band), [])) == pytest.approx(whole, rel=1e-5)
    answers = [list(sample.answer_ids) for sample in samples]
    for item in (item for items in found.values() for item in items):
        start, end = max(0, item["position"] - 12), item["position"]
        assert item["context"] in [answer[start:end] for answer in answers]
    (tmp_path / "x.npz").write_bytes(b"torn")
    assert Batch.read(tmp_path / "x.npz") is None


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
        measurement = Measurement(sources, dict.fromkeys(sources, head), ())
        assert find_refusal_tokens(measurement, codec, some_prompts(5)) == expected


def samples_of(
    tmp_path: Path, mode: str, prompts: list[Prompt], number: int = 0, length: int = 9
) -> list[DiagnosisSample]:
    run = a_run(a_config(tmp_path, answers=mode), tmp_path, length)
    return batch_samples(run, prompts[0].kind, prompts, number)


def test_answers_given_extended_and_sampled(tmp_path: Path) -> None:
    prompts = some_prompts(8, "abc")
    own = tuple(LetterCodec().encode_answer("abc"))
    assert [sample.answer_ids for sample in samples_of(tmp_path, "given", prompts)] == [own] * 8
    extended = samples_of(tmp_path, "extended", prompts)
    assert all(sample.answer_ids[:3] == own and len(sample.answer_ids) == 12 for sample in extended)
    sampled = samples_of(tmp_path, "sampled", prompts)
    prefix = tuple(LetterCodec().encode_answer("ok"))
    assert 0 < len(sampled) < 8  # what the judge does not call compliant is left out
    assert all(sample.answer_ids[:2] == prefix and sample.answer_ids[2] % 2 for sample in sampled)
    assert samples_of(tmp_path, "given", some_prompts(8)) == sampled  # no column: sampled too
    benign = some_prompts(8, kind="benign")
    first = samples_of(tmp_path, "sampled", benign)
    assert len(first) == 8
    assert samples_of(tmp_path, "sampled", benign) == first
    assert samples_of(tmp_path, "sampled", benign, number=1) != first, "batches share no random numbers"


def test_responses_end_with_the_context_and_long_prompts_are_left_out(tmp_path: Path) -> None:
    prompts = [replace(some_prompts(1, "a" * 50)[0], text="x" * size) for size in (3, 30, 36, 80)]
    prompts = [replace(prompt, prompt_id=f"p{index}") for index, prompt in enumerate(prompts)]
    found = {sample.prompt_id: len(sample.answer_ids) for sample in samples_of(tmp_path, "extended", prompts)}
    assert found == {"p0": 24, "p1": 8}


def test_prompts_come_from_the_diagnosis_or_from_the_held_out_files(tmp_path: Path) -> None:
    for name in ("held", "own"):
        rows = [{"prompt": f"{name} {index}", "said": "yes"} for index in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = a_config(tmp_path)
    with pytest.raises(DataError, match=r"diagnose\.benign"):
        read_prompts(config, "benign")
    held = {"evaluation": {"harmful": [{"path": str(tmp_path / "held.jsonl"), "answer": "said"}]}}
    config = config.model_copy(update={"data": config.data.model_validate({"source": "files", **held})})
    found = list(read_prompts(config, "harmful"))
    assert [prompt.text for prompt in found] == [f"held {index}" for index in range(10)]
    assert found[0].answer == "yes"
    own = DiagnoseConfig.model_validate({"harmful": [{"path": "own.jsonl"}], "num_prompts": None})
    own = map_paths(own, lambda _, path: tmp_path / path)
    assert len(list(read_prompts(config.model_copy(update={"diagnose": own}), "harmful"))) == 20
