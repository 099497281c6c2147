"""Batches one after the other, interrupted and resumed; and the whole command on the organism."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raycomplete.commands.diagnose import check_same_inputs
from raycomplete.diagnosis import measurement as measuring
from raycomplete.diagnosis.measurement import Batch, measure_kind, measure_samples
from raycomplete.diagnosis.samples import read_prompts
from raycomplete.diagnosis.statistics import kind_summary
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json
from tests.conftest import ROOT, raycomplete
from tests.diagnosis.planted import HIDDEN, a_config, a_run, normal, planted_measurement


class Stopped(Exception):
    """Stands for a kill."""


def a_diagnosis(tmp_path: Path, name: str) -> Run:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {index}"}) + "\n" for index in range(10)))
    config = a_config(tmp_path, harmful=[{"path": str(file)}])
    return a_run(config, tmp_path / name)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BATCH_PROMPTS", 3)
    monkeypatch.setattr(measuring, "BATCH_TOKENS", 40)


def measured(run: Run, **planted: Any) -> list[Batch]:
    prompts = list(read_prompts(run.config, "harmful"))
    return measure_kind(run, planted_measurement(**planted), "harmful", prompts)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"aligned": normal(5, 4, HIDDEN), "student": normal(6, 30, HIDDEN)}
    whole, stopped = a_diagnosis(tmp_path, "whole"), a_diagnosis(tmp_path, "stopped")
    batches = [measured(whole, **planted)]
    assert len(batches[0]) == 4
    made = 0

    def fails_at_the_third(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise Stopped
        return measure_samples(*arguments)

    monkeypatch.setattr(measuring, "measure_samples", fails_at_the_third)
    with pytest.raises(Stopped):
        measured(stopped, **planted)
    first = stopped.folder / "batches" / "harmful-00000.npz"
    written = first.stat().st_mtime_ns
    assert not (stopped.folder / "batches" / "harmful-00002.npz").exists()
    batches.append(measured(stopped, **planted))
    assert first.stat().st_mtime_ns == written
    assert made == 5  # the two that were finished were not made again
    summaries = [kind_summary(found, ("aligned", "student")) for found in batches]
    assert summaries[0] == summaries[1]
    assert summaries[0]["prompts"] == 10
    assert 0 < summaries[0]["measured"] < 10


def test_other_prompts_under_the_same_name_are_refused(tmp_path: Path) -> None:
    run = a_diagnosis(tmp_path, "run")
    measured(run, aligned=None)
    path = Path(run.config.diagnose.harmful[0].path)
    path.write_text(path.read_text().replace("prompt 7", "prompt seven"))
    with pytest.raises(ConfigError, match="batch 2"):
        measured(run, aligned=None)


def test_changed_settings_are_refused_unless_they_only_concern_what_follows(tmp_path: Path) -> None:
    check_same_inputs(a_run(a_config(tmp_path), tmp_path))
    check_same_inputs(a_run(a_config(tmp_path, gradient="off", show_harmful=True), tmp_path))
    with pytest.raises(ConfigError, match=r"diagnose\.max_tokens"):
        check_same_inputs(a_run(a_config(tmp_path, max_tokens=5), tmp_path))


def test_a_diagnosis_goes_on_that_an_earlier_version_began(tmp_path: Path) -> None:
    run = a_run(a_config(tmp_path), tmp_path)
    check_same_inputs(run)
    file = run.folder / "inputs.json"
    inputs = json.loads(file.read_text())
    write_json(
        file, inputs | {"diagnose.harmful": [source | {"context": None} for source in inputs["diagnose.harmful"]]}
    )
    check_same_inputs(run)


def test_base_against_itself_and_a_planted_change(tmp_path: Path) -> None:
    batches = measured(a_diagnosis(tmp_path, "run"), aligned=None, student=normal(6, 10, HIDDEN))
    found = kind_summary(batches, ("aligned", "student"))
    same, planted = found["profile"]["aligned"], found["profile"]["student"]
    length = len(same["n"])
    assert length == 11
    assert same["kl_to_base"]["mean"] == [0.0] * length
    assert same["deficit"]["mean"] == same["agreement"]["mean"] == [1.0] * length
    assert same["deficit"]["low"] == same["deficit"]["high"] == [1.0] * length
    assert found["completion_depth"]["aligned"]["depth"] == 0
    assert min(planted["kl_to_base"]["mean"][:10]) > 0.01
    assert planted["kl_to_base"]["mean"][10:] == [0.0]
    assert planted["deficit"]["mean"][10:] == [1.0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_on_the_organism(finished_diagnosis: Path, tmp_path: Path) -> None:
    """One batch and the result are taken away from a finished diagnosis and made again: the numbers are the same."""
    shutil.copytree(finished_diagnosis.parents[1], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "runs" / "organism-diagnosis"
    found = json.loads((folder / "diagnosis.json").read_text())
    aligned = found["kinds"]["harmful"]["profile"]["aligned"]
    assert aligned["kl_to_base"]["mean"][0] > 1.0
    assert max(aligned["kl_to_base"]["mean"][20:60]) < 0.1
    assert found["kinds"]["harmful"]["completion_depth"]["aligned"]["depth"] == 1
    assert found["refusal_tokens"]
    assert max(found["kinds"]["benign"]["profile"]["aligned"]["kl_to_base"]["mean"]) < 0.2
    assert found["gradient"]["pairs"] >= 8
    assert all("•" in item["context"] or not item["context"] for item in found["tokens"] if item["kind"] == "harmful")
    assert (folder / "report.html").is_file()
    arguments = ("diagnose", str(ROOT / "jobs" / "organism.yaml"), "diagnose.num_prompts=16")
    again = raycomplete(*arguments, folder=tmp_path, timeout_s=120)
    assert (again.returncode, "--resume" in again.stderr) == (2, True)
    kept = folder / "batches" / "harmful-00000.npz"
    written = kept.stat().st_mtime_ns
    (folder / "batches" / "benign-00000.npz").unlink()
    (folder / "diagnosis.json").unlink()
    resumed = raycomplete(*arguments, "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert kept.stat().st_mtime_ns == written
    assert Batch.read(folder / "batches" / "benign-00000.npz") is not None
    times = ("seconds", "measured_s", "tokens_per_s")
    now = json.loads((folder / "diagnosis.json").read_text())
    assert {k: v for k, v in now.items() if k not in times} == {k: v for k, v in found.items() if k not in times}
