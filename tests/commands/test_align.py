"""When `raycomplete align` has nothing to do, and when it only seems so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import raycomplete as rc
from raycomplete.commands import align as module
from raycomplete.commands.align import align
from raycomplete.config import RunConfig, load_run_file
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_text


class Begun(Exception):
    """The command went on to its work."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(module, "prepare_models", begin)
    write_text(tmp_path / "prompts.jsonl", '{"prompt": "p", "answer": "a"}\n')
    source = f"[{{path: {tmp_path / 'prompts.jsonl'}, answer: answer}}]"
    write_text(tmp_path / "aligned" / "config.json", "{}")
    return load_run_file(
        "jobs/organism.yaml",
        [
            f"models.aligned={tmp_path / 'aligned'}",
            f"align.refusals={source}",
            f"align.benign={source}",
            f"output.root={tmp_path / 'runs'}",
        ],
    )


@pytest.mark.parametrize("command", [rc.train, rc.align, rc.diagnose])
def test_thoughts_are_neither_trained_nor_diagnosed(command: Any, config: RunConfig) -> None:
    models = config.models.model_copy(update={"template_arguments": {"enable_thinking": True}})
    with pytest.raises(ConfigError, match="sets enable_thinking, and what is trained and diagnosed are answers"):
        command(config.model_copy(update={"models": models}), console=Console(quiet=True))


def test_a_checkpoint_that_is_there_is_not_made_again(config: RunConfig, tmp_path: Path) -> None:
    console = Console(quiet=True)
    assert align(config, console=console) == tmp_path / "aligned"
    assert align(config, resume=True, console=console) == tmp_path / "aligned"
    with pytest.raises(Begun):
        align(config, overwrite=True, console=console)


def test_the_old_checkpoint_is_not_taken_for_one_that_a_kill_prevented(config: RunConfig, tmp_path: Path) -> None:
    """`--overwrite` was killed half-way, so that what lies there is from before."""
    folder = tmp_path / "runs" / "organism-align"
    write_text(folder / "config.yaml", "")
    for resume in (False, True):
        with pytest.raises(Begun):
            align(config, resume=resume, console=Console(quiet=True))
    write_text(folder / "aligned.json", "{}")
    assert align(config, resume=True, console=Console(quiet=True)) == tmp_path / "aligned"
