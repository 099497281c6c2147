"""A disk that fills up: refused before, named when it happens, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig
from raycomplete.errors import DiskFullError, SetupError
from raycomplete.files import write_text
from raycomplete.training import disk
from raycomplete.training.disk import check_space, checkpoint_bytes, count_parameters, named_when_full
from tests.training.tiny import make_model

FULL = Path("/dev/full")  # every write to it fails as on a full disk


def write_to_full_disk() -> None:
    FULL.write_text("row")


def save_to_full_disk() -> None:
    torch.save({"weight": torch.zeros(100_000)}, FULL)


def exceed_the_quota() -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("work", [write_to_full_disk, save_to_full_disk, exceed_the_quota])
def test_a_full_disk_is_told_in_one_sentence(work: Callable[[], None], tmp_path: Path) -> None:
    unfinished = tmp_path / "step-000002"
    (unfinished / "state").mkdir(parents=True)
    whole = tmp_path / "step-000001" / "complete.json"
    write_text(whole, "{}")
    with pytest.raises(DiskFullError) as caught, named_when_full(tmp_path, "the checkpoint", 3 * 2**30, unfinished):
        work()
    assert f"the checkpoint could not be written to {tmp_path} (3.0 GiB needed, " in caught.value.problem
    assert "--resume" in caught.value.remedy
    assert not unfinished.exists()
    assert whole.is_file()


def test_other_errors_pass_and_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="else"), named_when_full(tmp_path, "it", unfinished=tmp_path):
        raise OSError(errno.EIO, "something else")
    assert tmp_path.exists()


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
