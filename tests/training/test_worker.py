"""Parts of a training worker that need no engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from raycomplete.config import ValidationConfig
from raycomplete.data.samples import SampleSet
from raycomplete.runtime.files import read_json, write_json
from raycomplete.training.validation import Steering
from raycomplete.training.worker import Worker


def test_a_best_step_that_is_lost_is_not_said_to_be_kept(tmp_path: Path) -> None:
    """All steps were done and step 60 was noted; then `best/` was lost, and the last step is what is exported."""
    file = tmp_path / "kept_step.json"
    write_json(file, {"step": 60, "why": "Step 60 is kept."})
    worker = Worker.__new__(Worker)
    worker.__dict__ |= {
        "job": SimpleNamespace(train=SimpleNamespace(steps=100), kept_step_file=file, scorers={}),
        "steering": Steering(ValidationConfig(), {}),  # it has forgotten the best step
        "validator": object(),
        "samples": SampleSet(()),
        "first_step": 100,
        "sinks": [],
        "rank": 0,
    }
    assert worker.train() is None
    kept = read_json(file)
    assert kept is not None
    assert kept["step"] == 100
    assert kept["why"].startswith("The last step is kept: the weights of the best measured one are lost")
