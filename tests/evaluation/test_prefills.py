"""The compliant answers that test prefills are cut from: who writes them, and how they begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.config import EvaluationConfig, RolloutConfig, RunConfig, load_run_file
from raycomplete.data.inputs import Prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.evaluation import roles
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.roles import complete_answers, held_out_sets
from raycomplete.runtime.console import Console
from raycomplete.runtime.types import Prompt
from tests.conftest import ROOT

OPENING = "Of course. To begin with,"
PROMPTS = (
    Prompt("none", "open it", "harmful"),
    Prompt("short", "close it", "harmful", "Sure, like this:"),
    Prompt("long", "paint it", "harmful", " ".join(f"word{n}" for n in range(12))),
)


def test_answers_are_continued_as_far_as_the_deepest_cut(model: Any, codec: Any) -> None:
    config = EvaluationConfig(depths=[0, 9])
    writer = model("take the key and then open the door and go in")
    answers = [prompt.answer for prompt in complete_answers(config, codec, writer, PROMPTS)]
    assert answers == [
        f"{OPENING} take the key and then open the door and",
        "Sure, like this: take the key and then open the door and",
        PROMPTS[2].answer,
    ]
    asked = [codec.decode(sequence) for sequence in writer.calls[0]]
    assert asked == [f"open it {OPENING}", "close it Sure, like this:"]
    assert writer.temperatures == [0.0], "greedily: training samples"


def config_of(**evaluation: Any) -> RunConfig:
    config = load_run_file(ROOT / "jobs" / "organism.yaml")
    data = config.data.model_copy(update={"source": "files"})
    changed = EvaluationConfig(depths=[0, 9], **evaluation)
    return config.model_copy(update={"data": data, "evaluation": changed})


def test_the_default_opening_is_not_that_of_training() -> None:
    theirs = {prefix.split()[0] for prefix in RolloutConfig().affirmative_prefixes if prefix}
    assert roles.PREFILL_OPENING.split()[0] not in theirs


def test_who_writes_them_and_when_they_are_written_anew(
    model: Any, codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base by the run's own generator, another checkpoint by an engine of its own, which is ended at once."""
    said: list[str] = []
    started: list[str] = []

    @contextmanager
    def start(config: RunConfig, checkpoint: str, role: str, title: str, console: Console) -> Iterator[Any]:
        started.append(checkpoint)
        yield "fingerprint", model("by another model"), codec
        started.append("ended")

    monkeypatch.setattr(roles, "start_model", start)

    class Pool:
        def with_weights(self, path: str) -> Any:
            said.append(Path(path).name)
            return model("by base")

    def written(**evaluation: Any) -> Sequence[str | None]:
        run: Any = SimpleNamespace(
            config=config_of(**evaluation),
            folder=tmp_path,
            prompts=Prompts({}, {"harmful": PROMPTS}),
            models=SimpleNamespace(paths={"base": checkpoint_path("base")}, codec=codec, fingerprint=str),
            generator=lambda role: Pool().with_weights(str(checkpoint_path(role))),
            console=Console(quiet=True),
            judge=RefusalJudge(),
        )
        return [prompt.answer for prompt in held_out_sets(run).evaluation["harmful"]]

    assert written()[0] == f"{OPENING} by base"
    assert written()[0] == f"{OPENING} by base"
    assert said == ["base"], "kept for a resumed run"
    assert written(prefill_from="organism:aligned")[0] == f"{OPENING} by another model"
    assert started == ["organism:aligned", "ended"]
    for change in ({"eos_ids": frozenset({0, 5})}, {"encode_prompt": lambda self, text, system=None: [1, 2]}):
        written()
        count = len(said)
        with monkeypatch.context() as patched:  # another template, or other arguments of it, and another end token
            for name, other in change.items():
                patched.setattr(type(codec), name, other)
            written()
        assert len(said) == count + 1
