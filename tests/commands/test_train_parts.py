"""Parts of `raycomplete train` that need no engine: its statistics."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomplete.commands import train
from raycomplete.config import load_run_file
from raycomplete.runtime.files import write_rows


def test_the_share_of_validation_is_of_the_time_with_validation(tmp_path: Path) -> None:
    """The seconds of a step end before it is measured on held-back prompts."""
    row = {"step": 1, "seconds": 50.0, "tokens": 10, "loss": 1.0, "sync_s": 10.0}
    write_rows(tmp_path / "metrics.jsonl", [row, row | {"step": 2, "validation_s": 50.0}])
    config = load_run_file("jobs/organism.yaml")
    stats = train.training_stats(config, tmp_path / "metrics.jsonl", None, {}, {})
    assert stats["validation_fraction"] == pytest.approx(1 / 3)
    assert stats["sync_fraction"] == pytest.approx(0.2)
