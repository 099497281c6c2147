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
from raycomplete.runtime.signals import StopSignals

SAME = ("models", "data", "rollout", "method", "train")  # as `train` compares


def config(root: Path, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "models": {"base": "organism:base", "aligned": "organism:aligned", "dtype": "float32", "max_length": 256},
        "data": {"source": "organism", "limit_per_kind": 4},
        "evaluation": {"depths": [0, 16], "max_tokens": 48, "max_utility_tokens": 112},
        "output": {"root": str(root), "name": "test"},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return parse(tree, "test")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_new_folder_holds_settings_and_versions(tmp_path: Path) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    assert folder == tmp_path / "test"
    assert files(folder) == {"config.yaml", "environment.json"}
    assert load_run_file(folder / "config.yaml") == config(tmp_path)
    versions = read_json(folder / "environment.json")
    assert versions is not None
    assert "torch" in versions


def test_an_empty_folder_is_taken_and_resume_may_be_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    OutputFolder(config(tmp_path), resume=True, same=SAME).open()
    assert (tmp_path / "test" / "config.yaml").is_file()


def test_a_finished_run_is_never_written_over(tmp_path: Path) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    (folder / "summary.json").write_text("mine")
    with pytest.raises(ConfigError, match=f"{folder} holds a run already. Add --resume"):
        OutputFolder(config(tmp_path, train={"steps": 9}), resume=False, same=SAME).open()
    assert (folder / "summary.json").read_text() == "mine"
    assert load_run_file(folder / "config.yaml").train.steps == 100


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            OutputFolder(config(tmp_path), resume=resume, overwrite=True, same=SAME).open()
    assert files(tmp_path / "test") == {"thesis.tex"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"Choose another output\.name"):
        OutputFolder(config(tmp_path, output={"name": "file"}), resume=False, same=SAME).open()


def test_overwrite_begins_anew_unless_the_run_is_resumed(tmp_path: Path) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    (folder / "samples.jsonl").touch()
    OutputFolder(config(tmp_path), resume=True, overwrite=True, same=SAME).open()
    assert (folder / "samples.jsonl").is_file()
    OutputFolder(config(tmp_path, train={"steps": 9}), resume=False, overwrite=True, same=SAME).open()
    assert files(folder) == {"config.yaml", "environment.json"}
    assert load_run_file(folder / "config.yaml").train.steps == 9


def test_a_refusal_does_not_remove_the_run_that_it_would_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    (folder / "samples.jsonl").touch()

    def refuse() -> dict[str, str]:
        raise SetupError("vLLM is not installed.")

    monkeypatch.setattr(engines_run, "package_versions", refuse)
    with pytest.raises(SetupError):
        OutputFolder(config(tmp_path), resume=False, overwrite=True, same=SAME).open()
    assert (folder / "samples.jsonl").is_file()


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"train": {"steps": 9}}, "train.steps"),
        ({"train": {"lr": 1e-6, "seed": 3}}, "train.lr, train.seed"),
        ({"method": {"depth": {"max": 9}}}, "method"),
        ({"models": {"max_length": 128}}, "models"),
        ({"data": {"seed": 4}, "rollout": {"max_student_tokens": 7}}, "data, rollout.max_student_tokens"),
        ({"rollout": {"gpu_memory_utilization": 0.1, "temperature": 0.5}}, "rollout.temperature"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_their_names(
    sections: dict[str, Any], names: str, tmp_path: Path
) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        OutputFolder(config(tmp_path, **sections), resume=True, same=SAME).open()
    assert f"was started with other values of {names}." in str(caught.value)
    assert (folder / "config.yaml").read_bytes() == before


def test_a_run_that_auto_would_continue_in_another_number_format_says_so(tmp_path: Path) -> None:
    """The run file is the same, and the machine another."""
    OutputFolder(config(tmp_path, models={"dtype": "bfloat16"}), same=SAME).open()
    with pytest.raises(ConfigError, match=r"was bfloat16, and is float32 now.* overrides, and models\.dtype=bfloat16"):
        OutputFolder(config(tmp_path, models={"dtype": "float32"}), resume=True, same=SAME).open()


def test_settings_that_change_no_result_may_change_on_resume(tmp_path: Path) -> None:
    OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    moved = config(
        tmp_path,
        cluster={"use_gpu": "never", "start_timeout_s": 5},
        teacher={"prefetch": 7, "gpu_memory_utilization": 0.1},
        train={
            "checkpoint_every": 3,
            "keep_checkpoints": 9,
            "per_device_batch_size": 1,
            "max_failures": 9,
        },
        rollout={"gpu_memory_utilization": 0.1},
        evaluation={"num_prompts": 3},
    )
    folder = OutputFolder(moved, resume=True, same=SAME).open()
    assert load_run_file(folder / "config.yaml") == moved, "the file tells what the run now works with"


def test_an_evaluation_may_be_added_under_other_settings_of_its_own(tmp_path: Path) -> None:
    """Only `same` is compared, and the settings that the student was trained with stay on record."""
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    OutputFolder(
        config(tmp_path, evaluation={"num_prompts": 3}), resume=True, keep_config=True, same=("models", "data")
    ).open()
    assert load_run_file(folder / "config.yaml") == config(tmp_path)
    with pytest.raises(ConfigError, match=r"other values of data\."):
        OutputFolder(config(tmp_path, data={"seed": 4}), resume=True, keep_config=True, same=("models", "data")).open()
    fresh = OutputFolder(
        config(tmp_path, output={"name": "new"}), resume=True, keep_config=True, same=("models", "data")
    ).open()
    assert (fresh / "config.yaml").is_file()


def test_a_broken_config_of_an_earlier_run_is_named(tmp_path: Path) -> None:
    folder = OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    (folder / "config.yaml").write_text("models: {base: a")
    with pytest.raises(ConfigError, match=f"{folder}/config.yaml is not valid YAML"):
        OutputFolder(config(tmp_path), resume=True, same=SAME).open()


def test_checking_writes_nothing(tmp_path: Path) -> None:
    assert "torch" in OutputFolder(config(tmp_path), resume=False, same=SAME).check()
    assert files(tmp_path) == set()


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
            command(config(tmp_path, **sections), console=Console(quiet=True))
    assert files(tmp_path) == set()
    assert command is not train or sizes[0] == OBJECT_STORE_BYTES < sizes[1], "the student's weights pass through it"


def test_an_evaluation_may_read_longer_sequences_than_the_training_did(tmp_path: Path) -> None:
    OutputFolder(config(tmp_path), resume=False, same=SAME).open()
    longer = config(tmp_path, models={"max_length": 512})
    with pytest.raises(ConfigError, match="other values of models"):
        OutputFolder(longer, resume=True, same=("models", "data")).check()
    OutputFolder(longer, resume=True, same=("models", "data"), free=("models.max_length",)).check()
    other = config(tmp_path, models={"max_length": 512, "dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"other values of models\.dtype"):
        OutputFolder(other, resume=True, same=("models", "data"), free=("models.max_length",)).check()


def test_a_key_that_is_free_off_policy_only_is_no_riddle(tmp_path: Path) -> None:
    on_policy = config(tmp_path, rollout={"on_policy": True})
    OutputFolder(on_policy, resume=False, same=SAME).open()
    with pytest.raises(ConfigError, match=r"other values of rollout\.on_policy\."):
        OutputFolder(config(tmp_path), resume=True, same=SAME).check()


def test_only_the_compared_sections_of_an_earlier_run_are_read(tmp_path: Path) -> None:
    """The others may name what this process does not know: attacks of a plugin, or keys of an earlier version."""
    folder = OutputFolder(config(tmp_path), same=SAME).open()
    written = (folder / "config.yaml").read_text()
    changed = written.replace("name: prefill", "name: of_a_plugin").replace("num_prompts: 100", "prompts: 100")
    assert changed != written
    (folder / "config.yaml").write_text(changed)
    OutputFolder(config(tmp_path), same=SAME, resume=True).check()
    (folder / "config.yaml").write_text(written.replace("lr: 5.0e-05", "lr: 4.0e-05"))
    with pytest.raises(ConfigError, match=r"other values of train\.lr\."):
        OutputFolder(config(tmp_path), same=SAME, resume=True).check()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            KeyboardInterrupt(),
            "Stopped on request during 'Answers of base'; what was done is kept. Go on with --resume.",
        ),
        (ProcessDiedError("A scorer died."), "Stopped on request during 'Answers of base'; what was done is kept."),
        (StoppedError("Stopped after step 7.", "Something else."), "Stopped after step 7. Go on with --resume."),
    ],
)
def test_what_a_signal_ends_is_told_in_one_sentence(error: BaseException, said: str, tmp_path: Path) -> None:
    console, folder, stop = Console(quiet=True), OutputFolder(config(tmp_path), resume=False, same=SAME), StopSignals()

    def work() -> None:
        with engines_run._told(stop, folder, console), console.stage("Answers of base"):
            raise error

    with pytest.raises(type(error)) as unasked:
        work()
    assert unasked.value is error, "nobody asked"
    stop.requested = True
    with pytest.raises(StoppedError) as caught:
        work()
    assert str(caught.value).startswith(said)


def test_a_failure_of_its_own_is_no_stop(tmp_path: Path) -> None:
    stop = StopSignals()
    stop.requested = True
    folder = OutputFolder(config(tmp_path), resume=True, same=SAME, keep_config=True)
    with pytest.raises(ValueError, match="a bug"), engines_run._told(stop, folder, Console(quiet=True)):
        raise ValueError("a bug")
    assert folder.way_on == "The same command goes on."
