"""Responses that a diagnosis reads, by mode and source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raycomplete.config import DiagnoseConfig, map_paths
from raycomplete.diagnosis.samples import DiagnosisSample, partition_samples, read_prompts
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt
from tests.diagnosis.planted import (
    LetterCodec,
    a_config,
    a_run,
    some_prompts,
)


def samples_of_mode(
    tmp_path: Path, mode: str, prompts: list[Prompt], number: int = 0, length: int = 9
) -> list[DiagnosisSample]:
    run = a_run(a_config(tmp_path, answers=mode), tmp_path, length)
    return partition_samples(run, prompts[0].kind, prompts, number)


def test_answers_given_extended_and_sampled(tmp_path: Path) -> None:
    prompts = some_prompts(8, "abc")
    own = tuple(LetterCodec().encode_answer("abc"))
    assert [sample.answer_ids for sample in samples_of_mode(tmp_path, "given", prompts)] == [own] * 8
    extended = samples_of_mode(tmp_path, "extended", prompts)
    assert all(sample.answer_ids[:3] == own and len(sample.answer_ids) == 12 for sample in extended)
    sampled = samples_of_mode(tmp_path, "sampled", prompts)
    prefix = tuple(LetterCodec().encode_answer("ok"))
    assert 0 < len(sampled) < 8  # what the judge does not call compliant is left out
    assert all(sample.answer_ids[:2] == prefix and sample.answer_ids[2] % 2 for sample in sampled)
    assert samples_of_mode(tmp_path, "given", some_prompts(8)) == sampled  # no column: sampled too
    assert len(samples_of_mode(tmp_path, "sampled", some_prompts(8, kind="benign"))) == 8


def test_partitions_share_no_random_numbers_and_repeat_themselves(tmp_path: Path) -> None:
    prompts = some_prompts(8, kind="benign")
    first = samples_of_mode(tmp_path, "sampled", prompts)
    assert samples_of_mode(tmp_path, "sampled", prompts) == first
    assert samples_of_mode(tmp_path, "sampled", prompts, number=1) != first


def test_responses_end_with_the_context_and_long_prompts_are_left_out(tmp_path: Path) -> None:
    prompts = [replace(some_prompts(1, "a" * 50)[0], text="x" * size) for size in (3, 30, 36, 80)]
    prompts = [replace(prompt, prompt_id=f"p{index}") for index, prompt in enumerate(prompts)]
    found = {sample.prompt_id: len(sample.answer_ids) for sample in samples_of_mode(tmp_path, "extended", prompts)}
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
