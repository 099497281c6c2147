"""An on-policy run of the organism that is stopped by one SIGTERM at five drawn moments, and resumed each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.stops import check_stopped


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """At the start, while sampling, twice while training and while evaluating."""
    print(check_stopped(tmp_path, "train", seed=0))
