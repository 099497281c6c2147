"""A run whose checkpoints would fill the disk is refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import TrainConfig
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import write_text
from raycomplete.training import disk_space as disk
from raycomplete.training.disk_space import check_space, checkpoint_bytes, count_parameters
from tests.training.tiny import make_model


def test_a_run_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "base", 0)
    train = TrainConfig(keep_checkpoints=2)
    count = count_parameters(model)
    assert count == sum(parameter.numel() for parameter in load(model).parameters())
    needed = 3 * checkpoint_bytes(count, "float32", train) + 4 * count

    def free(amount: int) -> Any:
        monkeypatch.setattr(disk, "free_bytes", lambda folder: amount)

    free(needed)
    check_space(tmp_path / "runs" / "new", model, "float32", train)
    free(needed - 1)
    with pytest.raises(SetupError, match=r"needs about .* \(3 checkpoints of .* lower train.keep_checkpoints"):
        check_space(tmp_path / "runs" / "new", model, "float32", train)
    # Checkpoints of a run that is resumed take their room already.
    write_text(tmp_path / "runs" / "old" / "checkpoints" / "step-000001" / "complete.json", "{}")
    check_space(tmp_path / "runs" / "old", model, "float32", train)


def load(path: Path) -> Any:
    from raycomplete.data.checkpoints import load_model

    return load_model(path, "float32")
