"""`make bench`: every implementation computes the same loss, then how fast and in how much memory."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.environment import RUNS
from tests.benchmarks.loss.run import log_log_slope, run


def test_slope_of_a_power_law_is_its_exponent() -> None:
    assert log_log_slope([(size, 3.0 * size**1.5) for size in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)


@pytest.mark.timeout(3600)
def test_every_variant_computes_the_same_loss_and_gradient() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = run(device, RUNS / f"loss-{device.type}")
    assert results.disagreements == []
