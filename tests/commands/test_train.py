"""Parts of `raycomplete train` that need no engine: statistics, progress, and refusals to resume."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from raycomplete.commands import train
from raycomplete.config import load_run_file
from raycomplete.data.inputs import Prompts
from raycomplete.evaluation.attack_resources import evaluation_inputs
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import Method
from raycomplete.methods.sft import SFT
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import write_json, write_rows
from raycomplete.runtime.types import Prompt
from tests.training.tiny import make_model


def test_the_share_of_validation_is_of_the_time_with_validation(tmp_path: Path) -> None:
    """The seconds of a step end before it is measured on held-back prompts."""
    row = {"step": 1, "seconds": 50.0, "tokens": 10, "loss": 1.0, "sync_s": 10.0}
    write_rows(tmp_path / "metrics.jsonl", [row, row | {"step": 2, "validation_s": 50.0}])
    config = load_run_file("jobs/organism.yaml")
    stats = train.training_stats(config, tmp_path / "metrics.jsonl", None, {}, {})
    assert stats["validation_fraction"] == pytest.approx(1 / 3)
    assert stats["sync_fraction"] == pytest.approx(0.2)


@pytest.mark.parametrize("changed", ["helper", "expert", "judge", "rubric", "prompt", "answer", "nothing"])
def test_a_run_whose_evaluation_would_read_something_else_is_not_finished(changed: str, tmp_path: Path) -> None:
    """Under the same names: what lies there was replaced."""
    for seed, name in enumerate(("helper", "expert", "judge")):
        make_model(tmp_path / name, seed)
    (tmp_path / "rubric.yaml").write_text("name: own")
    path = str(tmp_path)
    evaluation = {
        "attacks": [{"name": "rank_assisted_prefill", "helper": f"{path}/helper"}],
        "defence": {"name": "safe_decoding", "expert": f"{path}/expert"},
        "judge": {"kind": "model", "checkpoint": f"{path}/judge", "rubric": f"{path}/rubric.yaml"},
    }
    config = load_run_file("jobs/organism.yaml", [f"evaluation={json.dumps(evaluation)}"])

    def inputs(text: str = "x", answer: str = "a") -> str:
        kinds: Any = {"harmful": (Prompt("p", text, "harmful", answer),), "benign": (), "borderline": ()}
        return evaluation_inputs(config, Prompts({}, kinds))

    before = inputs()
    summary = {"evaluation": config.evaluation.model_dump(mode="json"), "evaluation_inputs": before}
    write_json(tmp_path / "summary.json", summary)
    if changed in ("helper", "expert", "judge"):
        make_model(tmp_path / changed, 9)
    elif changed == "rubric":
        (tmp_path / "rubric.yaml").write_text("name: another")
    now = inputs("y" if changed == "prompt" else "x", "b" if changed == "answer" else "a")
    assert train.is_finished(config, tmp_path, now) is (changed == "nothing")
    write_json(tmp_path / "summary.json", {"evaluation": summary["evaluation"]})  # an earlier version's
    assert train.is_finished(config, tmp_path, now)


@pytest.mark.parametrize(
    ("parameters", "on_policy", "use_gpu", "expected"),
    [
        (268_098_176, "false", False, ["rest", "stop_scorers", "wait"]),  # Gemma-3-270M
        (134_515_008, "false", False, []),  # SmolLM2-135M
        (268_098_176, "true", False, []),
        (268_098_176, "false", True, []),
    ],
)
def test_the_rollout_engine_of_a_larger_model_rests_while_samples_are_fixed(
    parameters: int, on_policy: str, use_gpu: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "count_parameters", lambda path: parameters)
    calls: list[str] = []
    generator = SimpleNamespace(
        rest=lambda: calls.append("rest"), wait_until_ready=lambda timeout_s: calls.append("wait")
    )
    overrides = [f"rollout.on_policy={on_policy}", "models.dtype=bfloat16"]
    run: Any = SimpleNamespace(
        config=load_run_file("jobs/organism.yaml", overrides),
        models=SimpleNamespace(paths={"student": Path("student")}),
        engines=SimpleNamespace(generator=generator, stop_scorers=lambda: calls.append("stop_scorers")),
        cluster=SimpleNamespace(use_gpu=use_gpu),
        console=Console(quiet=True),
    )
    with train._resting_generator(run):
        assert calls == expected[:1]
    assert calls == expected


TERMS = {"anchor": 0.1, "recovery": 0.25, "push_forward": None, "depth_mean": 12.4, "compliance": 0.5}


@pytest.mark.parametrize(
    ("method", "more", "remark"),
    [
        (SFT(), {"nll": 0.5}, "loss 0.5000, 8 tok/s"),
        (SFT(), {"bad_steps": 2}, "loss 0.5000, 2 steps left out, 8 tok/s"),
        (Completion(), TERMS, "loss 0.5000, anchor 0.1000, recovery 0.2500, depth 12, complies 0.50, 8 tok/s"),
    ],
)
def test_a_step_is_told_by_the_terms_of_its_method(
    method: Method, more: dict[str, Any], remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, str]] = []

    @contextmanager
    def progress(title: str, total: int) -> Any:
        yield lambda done, text: shown.append((done, text))

    row = {"step": 1, "loss": 0.5, "tokens_per_s": 8.0} | more
    monkeypatch.setattr(train, "fit", lambda job, *, on_step, **options: on_step(row))
    job: Any = SimpleNamespace(method=method, train=SimpleNamespace(steps=2))
    run: Any = MagicMock(console=SimpleNamespace(progress=progress))
    train.run_training(run, job, "Training")
    assert shown == [(1, remark)]
