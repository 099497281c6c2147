"""When `raycomplete align` has nothing to do, and when it only seems so."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raycomplete as rc
from raycomplete.commands import align as module
from raycomplete.commands.align import align
from raycomplete.config import PromptSets, RunConfig, load_run_file
from raycomplete.data.inputs import Prompts, prepare_alignment_prompts
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, DataError
from raycomplete.runtime.files import write_text
from raycomplete.runtime.types import Prompt
from tests.attacks.fixtures import WordCodec


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


def test_what_is_evaluated_is_not_trained(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prepare_models", lambda *_, **__: SimpleNamespace(paths={"base": tmp_path}))
    monkeypatch.setattr(module, "check_trainable", lambda _: None)

    def evaluated(sets: PromptSets, max_overlap: float = 1.0) -> RunConfig:
        values = {"source": "files", "evaluation": sets, "max_overlap": max_overlap}
        return config.model_copy(update={"data": config.data.model_copy(update=values)})

    same = PromptSets(harmful=config.align.refusals)
    with pytest.raises(DataError, match=r"1 prompts of data\.evaluation are in align\.refusals or align\.benign"):
        align(evaluated(same), overwrite=True, console=Console(quiet=True))
    with pytest.raises(DataError, match="no prompt that is far enough from the evaluation"):
        align(evaluated(same, max_overlap=0.6), overwrite=True, console=Console(quiet=True))
    assert not (tmp_path / "runs").exists()
    assert len(prepare_alignment_prompts(evaluated(PromptSets())).train["harmful"]) == 1, "nothing is evaluated yet"


def test_answers_under_two_seeds_share_no_draw(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class Base:
        def generate_finished(self, sequences: list[list[int]], *, seed: int, **_: Any) -> list[tuple[list[int], bool]]:
            seeds.append(seed)
            return [([3], True) for _ in sequences]

    class Codec(WordCodec):
        eos_id = 0

    monkeypatch.setattr(module, "sampled_from", lambda *_: nullcontext(Base()))
    harmful, benign = Prompt("h", "break it", "harmful", "no"), Prompt("b", "bake it", "benign")
    for seed in (0, 1):
        run: Any = SimpleNamespace(
            config=config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})}),
            models=SimpleNamespace(codec=Codec(), paths={"base": Path("base")}),
            prompts=Prompts({"harmful": (harmful,), "benign": (benign,)}, {}),
            console=Console(quiet=True),
        )
        module._samples(run)
    assert abs(seeds[0] - seeds[1]) >= 2**20, "sequence i of a call is drawn under its seed + i"
