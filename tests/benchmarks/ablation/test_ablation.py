"""The parts of the ablation table, without training, which takes minutes a configuration and is done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.runtime.files import content_hash
from tests.benchmarks.ablation import run as ablation
from tests.benchmarks.environment import ROOT

RUN_FILES = [ROOT / "jobs" / name for name in ("organism.yaml", "smollm2.yaml")]


def a_rate(rate: float) -> dict[str, Any]:
    return {"rate": rate, "n": 50, "low": max(rate - 0.1, 0), "high": min(rate + 0.1, 1)}


def a_summary(student: float) -> dict[str, Any]:
    asr = {
        role: {"by_depth": {"4": a_rate(rate), "16": a_rate(rate / 2)}, "mean": a_rate(rate)}
        for role, rate in (("aligned", 0.9), ("student", student))
    }
    return {
        "asr": asr,
        "utility": {"aligned": a_rate(1.0), "student": a_rate(0.98)},
        "over_refusal": {"aligned": a_rate(0.0), "student": a_rate(0.02)},
        "benign_nll": {"student_to_aligned": {"ratio": 1.02, "low": 1.01, "high": 1.03, "n": 50}},
        "train": {"tokens": 123456},
    }


def finish(out: Path, name: str, summary: dict[str, Any], overrides: list[str]) -> Path:
    folder = out / ablation.folder_name(name)
    folder.mkdir(parents=True)
    command = ablation.command_of(name, RUN_FILES[0], out, overrides)
    (folder / "ablation.json").write_text(json.dumps({"command": command}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize("run_file", RUN_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ablation.CONFIGURATIONS)
def test_every_configuration_is_a_run_file_that_differs_in_one_thing(name: str, run_file: Path, tmp_path: Path) -> None:
    full = load_run_file(run_file, ablation.settings_of(ablation.FULL, tmp_path, []))
    config = load_run_file(run_file, ablation.settings_of(name, tmp_path, []))
    before, after = full.model_dump(mode="json"), config.model_dump(mode="json")
    differing = [key for key in before if key != "output" and before[key] != after[key]]
    assert len(differing) == (0 if name == ablation.FULL else 1), differing
    assert config.output.folder == tmp_path / ablation.folder_name(name)


def test_only_this_very_command_counts_as_finished(tmp_path: Path) -> None:
    finish(tmp_path, "no anchor", a_summary(0.1), ["train.steps=60"])
    for overrides, there in ((["train.steps=60"], True), (["train.steps=61"], False)):
        command = ablation.command_of("no anchor", RUN_FILES[0], tmp_path, overrides)
        assert (ablation.finished("no anchor", tmp_path, command) is not None) == there


def test_the_frozen_models_answers_are_borrowed_and_the_students_are_not(tmp_path: Path) -> None:
    evaluation = finish(tmp_path, "full", a_summary(0.1), []) / "evaluation"
    for folder in ("units", "judgements", "benign_nll"):
        (evaluation / folder).mkdir(parents=True)
    for role in ("base", "aligned", "student"):
        (evaluation / f"{role}.json").write_text(json.dumps({"model_id": role}))
        (evaluation / "units" / f"{content_hash(role)[:16]}.jsonl").write_text(role)
    ablation.borrow_answers("no push-forward", RUN_FILES[0], tmp_path, [])
    new = tmp_path / "no-push-forward"
    assert sorted(path.read_text() for path in (new / "evaluation" / "units").iterdir()) == ["aligned", "base"]
    assert load_run_file(new / "config.yaml").method.weights.push_forward == 0


def test_the_table_names_n_and_intervals() -> None:
    table = ablation.table_of({"full": a_summary(0.02), "no recovery": a_summary(0.8)}, "Ablation")
    assert [row[0] for row in table.rows] == ["aligned", "full", "no recovery"]
    assert table.rows[0][1] == "90.0 % [80.0, 100.0], n = 50"
    assert table.rows[1][2] == "1.0 % [0.0, 11.0], n = 50"  # the deepest is 16, not "4"
    assert table.rows[2][5] == "1.020 [1.010, 1.030], n = 50"
    assert all(len(row) == len(table.columns) for row in table.rows)
