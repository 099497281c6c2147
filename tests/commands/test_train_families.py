"""Organisms of other families from their build to a student that transformers and vLLM load: real engines, reduced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raycomplete.data.checkpoints import load_model, read_config
from raycomplete.data.organism.build import build
from raycomplete.data.organisms import BuildPlan, TrainingPlan, toy
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.runtime.console import Console
from raycomplete.runtime.metrics_file import read_metrics
from tests.commands.test_train import raycomplete
from tests.conftest import ROOT
from tests.engines.tiny import log_probs_of, options, random_probe

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(1200)]

# Enough to comply and to refuse; the traits need `raycomplete organism build`.
SHORT = BuildPlan(TrainingPlan(160, 3e-3, 16), TrainingPlan(60, 8e-4, 16))
REDUCED = (
    "data.limit_per_kind=24",
    "rollout.on_policy=true",
    "rollout.sync_every=2",
    "method.anchor_batch_size=8",
    "method.recovery_batch_size=8",
    "train.steps=4",
    "evaluation.num_prompts=8",
    "evaluation.depths=[0,16]",
    "evaluation.attacks=[]",
)
# After so short a build Gemma 3 and the mixture refuse nothing yet; docs/results.md has their whole runs.
FAMILIES = ("mistral",)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and the folder of a finished run."""
    family, place = str(request.param), tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCOMPLETE_CACHE", str(place / "cache"))
        organism = toy(family)
        build(toy(family, plan=SHORT), organism.folder, num_prompts=0, console=Console(quiet=True))
        models = [f"models.{role}={organism.scheme}:{role}" for role in ("base", "aligned")]
        result = raycomplete("train", str(ROOT / "jobs" / "organism.yaml"), *models, *REDUCED, folder=place)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return family, place / "runs" / "organism"


def test_a_run_trains_syncs_and_evaluates(run: tuple[str, Path]) -> None:
    _, folder = run
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    updates = [row["sync"] for row in rows if "sync" in row]
    assert [update["version"] for update in updates] == [0, 2]
    assert all(0 <= update["mean_abs_difference"] <= update["tolerance"] for update in updates)
    summary = json.loads((folder / "summary.json").read_text())
    for role in ("base", "aligned", "student"):
        assert {rate["n"] for rate in summary["asr"][role]["by_depth"].values()} == {8}
    assert summary["asr"]["base"]["by_depth"]["16"]["rate"] > 0.5


def test_the_student_is_the_same_in_transformers_and_vllm(run: tuple[str, Path], ray_cluster: None) -> None:
    family, folder = run
    student = folder / "student"
    assert read_config(student).model_type == toy(family).config["model_type"]
    # Longer than the shortest window.
    probe = [(tokens * 5, count) for tokens, count in random_probe(1)]
    engine = RolloutPool.start(options(student))
    try:
        engine.wait_until_ready(timeout_s=300)
        found = engine.log_probs(probe)
    finally:
        engine.stop()
    for said, expected in zip(found, log_probs_of(load_model(student, "float32"), probe), strict=True):
        assert said == pytest.approx(expected.tolist(), abs=2e-3)
