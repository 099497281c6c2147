"""The replicas that evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomplete.serving import deployment
from tests.serving.conftest import make_config
from tests.serving.fakes import make_fake_backend


def test_a_runner_whose_thread_ended_is_unhealthy(tmp_path: Path) -> None:
    runner = deployment.EvaluationRunner(make_config(tmp_path), make_fake_backend)
    runner.check_health()
    runner._runner.stop()
    runner._thread.join(timeout=30)
    with pytest.raises(RuntimeError, match="thread ended"):
        runner.check_health()
