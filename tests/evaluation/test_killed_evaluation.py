"""An evaluation of the organism by nine attacks, whose driver is killed again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.evaluation import check_killed_evaluation


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_finished_is_generated_twice(tmp_path: Path) -> None:
    """Killed at two random moments it equals one that was left alone, response by response."""
    print(check_killed_evaluation(tmp_path, kills=2, seed=0))
