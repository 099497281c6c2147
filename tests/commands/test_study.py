"""The study command: what starts when, and what runs share."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.commands import study as command
from raycomplete.config import load_run_file
from raycomplete.config.study import FROZEN, Study, load_study
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, StoppedError
from raycomplete.runtime.files import PRIVATE, RowStore, read_json, write_text
from raycomplete.runtime.signals import Stop
from tests.config.test_study import study_file
from tests.conftest import ROOT

FILE = """
    methods: {completion: , npo: , augmentation: {rollout: {temperature: 0.5}}}
    seeds: [0, 1]
    defences: {again: {name: re_ask}}
    output: {name: side-by-side}
"""
# Stands for `python -m raycomplete train`: it takes a while to make samples, and a while to finish.
STAND_IN = """
import json, sys, time
from pathlib import Path
from raycomplete.config import load_run_file

config = load_run_file(sys.argv[4])
folder = config.output.folder
with (folder / "began").open("a") as file:
    file.write(f"{time.time()} {(folder / 'samples.jsonl').exists()} {(folder / 'evaluation').exists()}\\n")
time.sleep(0.3)
if sys.argv[3] == "train" and not (folder / "samples.jsonl").exists():
    (folder / "samples.jsonl").write_text(f"made by {config.output.name}")
if sys.argv[3] == "evaluate" and config.evaluation.defence is None:
    (folder / "evaluation" / "trials").mkdir(parents=True)
    (folder / "evaluation" / "trials" / "base.jsonl").write_text('{"key": "answer"}\\n')
if folder.name == "npo-seed1" and not (folder.parent.parent / "mended").exists():
    sys.exit(1)
time.sleep(0.3)
evaluation = config.evaluation.model_dump(mode="json")
role = "aligned" if folder.name == "aligned" else "student"
(folder / "evaluation").mkdir(exist_ok=True)
(folder / "evaluation" / f"{role}.json").write_text(json.dumps({"settings": {**evaluation, "temperature": 0.0}}))
(folder / "summary.json").write_text(json.dumps({"evaluation": evaluation}))
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study whose runs are scripts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    start = subprocess.Popen

    def stand_in(arguments: list[str], **options: Any) -> Any:
        if arguments[1:3] != ["-m", "raycomplete"]:
            return start(arguments, **options)
        return start([sys.executable, "stand_in.py", "-", "-", *arguments[3:]], **options)

    monkeypatch.setattr(command.subprocess, "Popen", stand_in)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return load_study(study_file(tmp_path, FILE))


class Quiet:
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def work(study: Study, places: int, stop: Stop | None = None) -> Quiet:
    """Runs all that is not finished, without a cluster."""
    console = Quiet()
    jobs = [command._Job(run, command.samples_key(run.config, {}) if run.trains else "") for run in study.runs]
    command._work(jobs, places, stop or Stop(), console, "an address")  # type: ignore[arg-type]
    return console


def began(study: Study) -> dict[str, list[list[str]]]:
    """When each run began, and if samples and answers were there, by folder name."""
    found = {}
    for run in study.runs:
        file = run.config.output.folder / "began"
        found[run.config.output.folder.name] = [line.split() for line in file.read_text().split("\n") if line]
    return found


def test_equal_samples_are_made_once_and_frozen_models_asked_once(study: Study) -> None:
    work(study, places=3)
    starts = began(study)
    assert all(len(times) == 1 for times in starts.values())
    first = starts.pop(FROZEN)[0]
    assert all(times[0][2] == "True" for times in starts.values())  # base's answers came first
    assert min(float(times[0][0]) for times in starts.values()) > float(first[0]) + 0.5
    folder = study.folder / "organism"
    assert "answer" in RowStore(folder / "completion-seed0" / "evaluation" / "trials" / "base.jsonl")
    made = {name: (folder / name / "samples.jsonl").read_text() for name in starts if name != "again"}
    assert made["completion-seed0"] == made["npo-seed0"] == "made by completion-seed0"
    assert made["completion-seed1"] == made["npo-seed1"] == "made by completion-seed1"
    assert made["augmentation-seed0"] == "made by augmentation-seed0"  # sampled in another way
    assert not (folder / "again" / "samples.jsonl").exists()
    assert (folder / "npo-seed0" / "inputs.json").is_file(), "the run refuses other models than those of its samples"


def test_a_run_that_fails_leaves_the_others_and_is_taken_up_again(study: Study) -> None:
    console = work(study, places=2)
    assert any("npo, seed 1: ended with 1" in line for line in console.said)
    (study.folder / "mended").touch()
    work(study, places=2)
    counts = {name: len(times) for name, times in began(study).items()}
    assert counts.pop("npo-seed1") == 2
    assert set(counts.values()) == {1}


def test_a_request_to_stop_ends_the_runs(study: Study) -> None:
    stop = Stop()
    stop.requested = True
    with pytest.raises(StoppedError, match="Resume"):
        work(study, places=2, stop=stop)
    assert not (study.folder / "organism").exists()


def test_a_study_that_is_there_or_at_work_is_refused(study: Study) -> None:
    with command._alone(study.folder, overwrite=False):
        with pytest.raises(ConfigError), command._alone(study.folder, overwrite=False):
            raise AssertionError("both hold it")
        with pytest.raises(ConfigError, match="--resume"):
            command.study(study)


def test_a_folder_that_no_study_made_is_never_wiped(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = study.folder / "thesis.txt"
    write_text(thesis, "years")
    with pytest.raises(ConfigError, match="no study made them"), command._alone(study.folder, overwrite=True):
        raise AssertionError("it was taken")
    assert [path.name for path in study.folder.iterdir()] == ["thesis.txt"]
    (study.folder / "study.lock").touch()
    monkeypatch.setattr(command, "_checked", lambda study, console: study)
    monkeypatch.setattr(command, "_refuse_others", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.study(study, resume=True, overwrite=True)
    assert thesis.exists(), "to resume wins, as in train"
    with command._alone(study.folder, overwrite=True):
        assert [path.name for path in study.folder.iterdir()] == ["study.lock"]


def test_a_result_of_another_evaluation_is_made_again(study: Study) -> None:
    write_text(study.folder / "mended", "")
    work(study, places=4)
    result = study.folder / "organism" / "npo-seed0" / "evaluation" / "student.json"
    write_text(result, json.dumps({"settings": {"num_prompts": 1}}))
    work(study, places=4)
    assert {name: len(times) for name, times in began(study).items() if len(times) > 1} == {"npo-seed0": 2}
    assert "temperature" in result.read_text()


def test_the_study_joins_the_cluster_of_the_run_file_and_its_runs_join_the_study_s(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("prepare_models", "prepare_prompts", "check_evaluation", "check_defence"):
        monkeypatch.setattr(command, name, lambda *_, **__: SimpleNamespace(codec=None, paths={}))
    monkeypatch.setattr(command, "resolve_dtype", lambda config, _: config)
    monkeypatch.setattr(command, "training_fingerprints", lambda *_: {})
    first = study.runs[0]
    for address, parallel in (("10.0.0.1:6379", None), ("local", 1)):
        cluster = first.config.cluster.model_copy(update={"address": address})
        run = command.replace(first, config=first.config.model_copy(update={"cluster": cluster}))
        checked = command._checked(command.replace(study, runs=(run,)), Console(quiet=True))
        assert checked.runs[0].config.cluster.address == address
        assert checked.config.parallel == parallel
    work(checked, places=1)
    assert load_run_file(first.config.output.folder / "run.yaml").cluster.address is None


def test_a_cluster_of_our_own_holds_the_weights_of_all_runs_at_a_time(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked: list[int] = []

    def connect(config: Any, plan: Any, console: Any, store_bytes: int) -> Any:
        asked.append(store_bytes)
        return nullcontext(SimpleNamespace(use_gpu=False))

    monkeypatch.setattr(command, "connect", connect)
    monkeypatch.setattr(command.ray, "nodes", list)
    runs = tuple(command.replace(run, store_bytes=place * 2**30) for place, run in enumerate(study.runs))
    settings = study.config.model_copy(update={"parallel": 3})
    with command._connected(command.replace(study, config=settings, runs=runs), Console(quiet=True)) as places:
        assert places == 3
    assert asked == [3 * (len(runs) - 1) * 2**30]


def test_a_run_of_other_settings_is_refused(study: Study, tmp_path: Path) -> None:
    work(study, places=4)
    changed = load_study(study_file(tmp_path, FILE), ["settings.train.steps=5"])
    with pytest.raises(ConfigError, match=r"started with other values of train\.steps"):
        command._refuse_others(changed)
    command._refuse_others(load_study(study_file(tmp_path, FILE), ["settings.evaluation.num_prompts=7"]))


def test_a_study_of_other_checkpoints_or_prompts_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs would stay those of the old model, and others would copy its samples."""

    def checked(**inputs: str) -> Study:
        return command.replace(study, runs=tuple(command.replace(run, inputs=inputs) for run in study.runs))

    first = checked(aligned="old", base="b")
    with command._alone(study.folder, overwrite=False):
        command._refuse_other_inputs(command.replace(first, runs=first.runs[:-1]))
        command._refuse_other_inputs(first)  # a run more
        command._refuse_other_inputs(checked(aligned="older", base="b"))  # none is started
        command._refuse_other_inputs(first)
    write_text(study.runs[0].config.output.folder / "config.yaml", "")
    assert (read_json(study.folder / "inputs.json") or {}).keys() == {run.name for run in study.runs}
    monkeypatch.setattr(command, "_refuse_others", lambda _: None)
    monkeypatch.setattr(command, "_checked", lambda *_: checked(aligned="new", base="b"))
    with pytest.raises(ConfigError, match=r"the content of these changed: aligned of organism\. .*--overwrite"):
        command.study(study, resume=True)


def test_a_run_gets_the_answers_that_it_lacks(tmp_path: Path) -> None:
    rows = [{"key": key, "tokens": [number]} for number, key in enumerate("abc")]
    frozen, run = tmp_path / "frozen", tmp_path / "run"
    RowStore(frozen / "trials" / "m.jsonl", mode=PRIVATE).add(rows[:2])
    write_text(frozen / "prefills.json", "[1]")
    command.share_answers(frozen, run)
    RowStore(run / "trials" / "m.jsonl").add(rows[2:])  # its own
    RowStore(frozen / "trials" / "m.jsonl").add([{"key": "d", "tokens": []}])  # of an attack that was added
    write_text(frozen / "prefills.json", "[2]")
    command.share_answers(frozen, run)
    assert [row["key"] for row in RowStore(run / "trials" / "m.jsonl").values()] == ["a", "b", "c", "d"]
    assert stat.S_IMODE((run / "trials" / "m.jsonl").stat().st_mode) == PRIVATE
    assert (run / "prefills.json").read_text() == "[2]"
