"""The run folder: who may write into it, and what a resumed run may change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from raycomplete.commands.evaluate import evaluate
from raycomplete.commands.train import train
from raycomplete.config import RunConfig, load_run_file, parse
from raycomplete.engines import run as engines_run
from raycomplete.engines.run import OutputFolder
from raycomplete.engines.spec import OBJECT_STORE_BYTES
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, ProcessDiedError, SetupError, StoppedError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.signals import InterruptedWork, Stop

TRAIN = ("models", "data", "rollout", "method", "train")  # as `train` compares
EVALUATE = ("models", "data")


def config(root: Path, sections: dict[str, Any] | None = None) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "models": {"base": "organism:base", "aligned": "organism:aligned", "dtype": "float32", "max_length": 256},
        "data": {"source": "organism", "limit_per_kind": 4},
        "evaluation": {"depths": [0, 16], "max_tokens": 48, "max_utility_tokens": 112},
        "output": {"root": str(root), "name": "test"},
    }
    for name, values in (sections or {}).items():
        tree[name] = tree.get(name, {}) | values
    return parse(tree, "test")


def folder_of(
    root: Path, sections: dict[str, Any] | None = None, same: tuple[str, ...] = TRAIN, **how: Any
) -> OutputFolder:
    return OutputFolder(config(root, sections), same=same, **how)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_finished_run_is_never_written_over_unasked(tmp_path: Path) -> None:
    folder = folder_of(tmp_path).open()
    assert files(folder) == {"config.yaml", "environment.json"}
    assert load_run_file(folder / "config.yaml") == config(tmp_path)
    assert "torch" in (read_json(folder / "environment.json") or {})
    (folder / "samples.jsonl").touch()
    with pytest.raises(ConfigError, match=f"{folder} holds a run already"):
        folder_of(tmp_path, {"train": {"steps": 9}}).open()
    assert load_run_file(folder / "config.yaml") == config(tmp_path)
    folder_of(tmp_path, resume=True, overwrite=True).open()
    assert (folder / "samples.jsonl").is_file()
    folder_of(tmp_path, {"train": {"steps": 9}}, overwrite=True).open()
    assert files(folder) == {"config.yaml", "environment.json"}
    assert load_run_file(folder / "config.yaml").train.steps == 9


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            folder_of(tmp_path, resume=resume, overwrite=True).open()
    assert files(tmp_path / "test") == {"thesis.tex"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"Choose another output\.name"):
        folder_of(tmp_path, {"output": {"name": "file"}}).open()


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"train": {"steps": 9}}, "train.steps"),
        ({"train": {"lr": 1e-6, "seed": 3}}, "train.lr, train.seed"),
        ({"method": {"depth": {"max": 9}}}, "method"),
        ({"models": {"max_length": 128}}, "models"),
        ({"data": {"seed": 4}, "rollout": {"temperature": 0.5}}, "data, rollout.temperature"),
        ({"models": {"dtype": "bfloat16"}}, "models (models.dtype was float32, and is bfloat16 now)"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_their_names(
    sections: dict[str, Any], names: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path).open()
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        folder_of(tmp_path, sections, resume=True).open()
    assert f"was started with other values of {names}." in str(caught.value)
    assert (folder / "config.yaml").read_bytes() == before


def test_settings_that_change_no_result_may_change_on_resume(tmp_path: Path) -> None:
    folder_of(tmp_path).open()
    changed = {
        "cluster": {"use_gpu": "never", "timeout_s": 5},
        "teacher": {"replicas": 2},
        "train": {"checkpoint_every": 3, "keep_checkpoints": 9, "per_device_batch_size": 1, "max_failures": 9},
        "evaluation": {"num_prompts": 3},
    }
    folder = folder_of(tmp_path, changed, resume=True).open()
    assert load_run_file(folder / "config.yaml") == config(tmp_path, changed), "what the run now works with"


def test_an_evaluation_may_be_added_under_other_settings_of_its_own(tmp_path: Path) -> None:
    """Only `same` is compared, and the settings that the student was trained with stay on record."""
    folder = folder_of(tmp_path).open()
    added: dict[str, Any] = {"same": EVALUATE, "resume": True, "keep_config": True}
    folder_of(tmp_path, {"evaluation": {"num_prompts": 3}}, **added).open()
    assert load_run_file(folder / "config.yaml") == config(tmp_path)
    for sections, names in (
        ({"data": {"seed": 4}}, r"data\."),
        ({"models": {"max_length": 512, "dtype": "bfloat16"}}, r"models\.dtype"),
    ):
        with pytest.raises(ConfigError, match=f"other values of {names}"):
            folder_of(tmp_path, sections, free=("models.max_length",), **added).open()
    folder_of(tmp_path, {"models": {"max_length": 512}}, free=("models.max_length",), **added).check()
    assert (folder_of(tmp_path, {"output": {"name": "new"}}, **added).open() / "config.yaml").is_file()


def test_only_the_compared_sections_of_an_earlier_run_are_read(tmp_path: Path) -> None:
    """The others may name what this process does not know: attacks of a plugin, or keys of an earlier version."""
    folder = folder_of(tmp_path).open()
    written = (folder / "config.yaml").read_text()
    changed = written.replace("name: prefill", "name: of_a_plugin").replace("num_prompts: 100", "prompts: 100")
    assert changed != written
    (folder / "config.yaml").write_text(changed)
    folder_of(tmp_path, resume=True).check()
    (folder / "config.yaml").write_text(written.replace("lr: 5.0e-05", "lr: 4.0e-05"))
    with pytest.raises(ConfigError, match=r"other values of train\.lr\."):
        folder_of(tmp_path, resume=True).check()


def test_other_checkpoints_or_prompts_than_at_the_start_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, inputs={"base": "a", "prompts": "b"}).open()
    folder_of(tmp_path, inputs={"base": "a", "new": "c"}, resume=True).open()
    assert read_json(folder / "inputs.json") == {"base": "a", "prompts": "b", "new": "c"}
    with pytest.raises(ConfigError, match="changed: prompts"):
        folder_of(tmp_path, inputs={"base": "a", "prompts": "x"}, resume=True).check()


@pytest.mark.parametrize("command", [train, evaluate])
def test_a_cluster_that_is_too_small_leaves_no_folder(
    command: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next attempt, with more nodes, would be told that the folder holds a run already."""
    sizes: list[int] = []

    def connect(*given: Any) -> AbstractContextManager[None]:
        sizes.append(given[3])
        raise SetupError("The run needs 8 GPU and the cluster has 0.")

    monkeypatch.setattr(engines_run, "connect", connect)
    for sections in ({}, {"rollout": {"on_policy": True}}):
        with pytest.raises(SetupError, match="needs 8 GPU"):
            command(config(tmp_path, sections), console=Console(quiet=True))
    assert files(tmp_path) == set()
    assert command is not train or sizes[0] == OBJECT_STORE_BYTES < sizes[1], "the student's weights pass through it"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InterruptedWork("Stopped."), "Stopped on request during 'Answers of base'; what was done is kept."),
        (ProcessDiedError("A scorer died."), "Stopped on request during 'Answers of base'; what was done is kept."),
        (StoppedError("Stopped after step 7.", "Something else."), "Stopped after step 7. Go on with --resume."),
        (ValueError("a bug"), ""),
    ],
)
def test_what_a_signal_ends_is_told_in_one_sentence(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, stop = Console(quiet=True), Stop()
    monkeypatch.setattr(engines_run, "stop", stop)
    for stop.requested in (False, True):
        with (
            pytest.raises(Exception, match=r".") as caught,
            engines_run._told(folder_of(tmp_path), console),
            console.stage("Answers of base"),
        ):
            raise error
        if stop.requested and said:
            assert type(caught.value) is StoppedError
            assert str(caught.value).startswith(said)
        else:
            assert caught.value is error
