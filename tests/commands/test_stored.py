"""A command and its storage: when it is read, when it is written, and what a failure leaves."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig, parse
from raycomplete.engines.run import OutputFolder
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, SetupError, WorkError
from raycomplete.runtime.files import write_text
from raycomplete.storage.mirror import Manifest
from raycomplete.storage.remote import Remote
from tests.storage.folders import add_checkpoint, add_rows
from tests.storage.test_integrity import flip

SAME = ("models", "data", "rollout", "method", "train")


def config(folder: Path, storage: str | None = None, **output: object) -> RunConfig:
    tree = {
        "models": {"base": "organism:base", "aligned": "organism:aligned"},
        "data": {"source": "organism"},
        "output": {"root": str(folder / "runs"), "storage": storage or f"file://{folder}/storage", **output},
    }
    return parse(tree, "test")


@stored()
def command(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    steps: int = 2,
    fails: bool = False,
    console: Console | None = None,
) -> Path:
    """Trains in a moment."""
    folder = OutputFolder(config, same=SAME, resume=resume, overwrite=overwrite).open()
    for name in ("samples.jsonl", "inputs.json"):
        if not (folder / name).is_file():
            write_text(folder / name, f"{name} of {steps} steps\n")
    add_rows(folder, steps)
    add_checkpoint(folder, steps)
    if fails:
        raise WorkError("A worker died.")
    return folder


run = partial(command, console=Console(quiet=True))


def pieces(folder: Path) -> list[str]:
    return sorted(Manifest(Remote(f"file://{folder}/storage/run")).pieces)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_command_made_is_mirrored_however_it_ends(fails: bool, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"A worker died\.") if fails else nullcontext():
        run(config(tmp_path), fails=fails)
    assert pieces(tmp_path) == ["checkpoints/step-000002", "files"]


def test_another_machine_goes_on_from_the_storage(tmp_path: Path) -> None:
    run(config(tmp_path))
    shutil.rmtree(tmp_path / "runs")
    folder = run(config(tmp_path), resume=True, steps=4)
    assert (folder / "samples.jsonl").read_text() == "samples.jsonl of 2 steps\n", "fetched, not made again"
    assert pieces(tmp_path) == ["checkpoints/step-000002", "checkpoints/step-000004", "files"]


def test_a_run_in_the_storage_is_never_written_over_unasked(tmp_path: Path) -> None:
    run(config(tmp_path))
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ConfigError, match="--overwrite"):
        run(config(tmp_path))
    run(config(tmp_path), overwrite=True, steps=1)
    assert pieces(tmp_path) == ["checkpoints/step-000001", "files"]
    assert not (tmp_path / "storage" / "run" / "checkpoints" / "step-000002").exists()


def test_a_refused_command_changes_nothing_in_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "storage").rglob("*") if path.is_file()}

    def refuse(*_: object, **__: object) -> Path:
        raise SetupError("The run needs 8 GPU and the cluster has 0.")

    monkeypatch.setattr(OutputFolder, "open", refuse)
    with pytest.raises(SetupError):
        run(config(tmp_path), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "storage").rglob("*") if path.is_file()} == before


def test_an_unusable_storage_refuses_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError):
        run(config(tmp_path, f"file://{tmp_path}/file"))
    assert not (tmp_path / "runs").exists()


def test_a_storage_that_fails_later_is_an_error_at_the_end_and_the_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Remote, "upload", full)
    monkeypatch.setattr("raycomplete.commands.stored.CLOSE_TIMEOUT_S", 1.0)
    with pytest.raises(WorkError, match=r"Not mirrored to .*checkpoints/step-000002: .*No space left.* --resume"):
        run(config(tmp_path))
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-000002" / "complete.json").is_file()


def test_without_storage_a_damaged_checkpoint_is_told_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = config(tmp_path).model_copy(update={"output": config(tmp_path).output.model_copy(update={"storage": None})})
    run(plain)
    flip(add_checkpoint(tmp_path / "runs" / "run", 3) / "latest")
    command(plain, resume=True, steps=4, console=Console())
    assert "step-000003 is damaged" in " ".join(capsys.readouterr().out.split())
