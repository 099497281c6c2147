"""Training checkpoints with one rank: which are resumed from, which stay, who wrote them, and the room they need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raycomplete.config import TrainConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.runtime.errors import CheckpointError, SetupError, WorkError
from raycomplete.runtime.files import write_text
from raycomplete.training import checkpoints as saving
from raycomplete.training.checkpoints import (
    check_owned,
    check_space,
    checkpoint_bytes,
    count_parameters,
    is_whole,
    make_private,
    restore_weights,
    save_weights,
)
from tests.storage.test_integrity import flip
from tests.training.tiny import make_model


class Engine:
    """Writes and reads one file a checkpoint."""

    def __init__(self) -> None:
        self.value = 0

    def save_checkpoint(self, folder: str, tag: str) -> None:
        path = Path(folder) / tag / "weights"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self.value))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        self.value = int((Path(folder) / tag / "weights").read_text())
        return folder, {}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(folder: Path, *steps: int, train: TrainConfig | None = None) -> Engine:
    engine, train = Engine(), train or TrainConfig()
    for engine.value in steps:
        saving.save(engine, folder, engine.value, {"sampler": engine.value}, train)
    return engine


def test_a_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    engine = saved(tmp_path, 1, 2)
    engine.value = 9
    state = saving.restore(engine, tmp_path)
    assert state is not None
    assert (engine.value, state["step"], state["sampler"]) == (2, 2, 2)
    assert saving.restore(engine, tmp_path / "nothing") is None


def test_a_damaged_newest_one_gives_way_and_damage_everywhere_is_an_error(tmp_path: Path) -> None:
    engine = saved(tmp_path, 1, 2)
    flip(tmp_path / "step-000002" / "state" / "weights")
    state = saving.restore(engine, tmp_path)
    assert state is not None
    assert (engine.value, state["step"]) == (1, 1)
    flip(tmp_path / "step-000001" / "state" / "weights")
    with pytest.raises(
        WorkError, match=r"No checkpoint in .* is whole \(step-000001: state/weights has another sha256"
    ):
        saving.restore(engine, tmp_path)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    make_private(folder)
    (folder / "step-000001" / "state").mkdir(parents=True)
    (folder / "step-000001" / "state" / "rank0.pt").write_bytes(b"x")
    (folder / "step-000001" / "complete.json").write_text('{"step": 1, "world_size": 1}')
    return folder


@pytest.mark.parametrize("mode", [0o770, 0o707])
@pytest.mark.parametrize("place", [".", "step-000001", "step-000001/state/rank0.pt"])
def test_what_others_may_write_is_refused(place: str, mode: int, checkpoints: Path) -> None:
    checkpoints.chmod(0o755)
    (checkpoints / place).chmod(mode)
    with pytest.raises(CheckpointError, match=r"can run code, and other users may write.*chmod -R go-w"):
        check_owned(checkpoints)


def test_files_of_another_user_are_refused(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if checkpoints.stat().st_uid == 0:  # the tests run as root, whose files anybody may trust
        os.chown(checkpoints / "step-000001", 54321, -1)
    with pytest.raises(CheckpointError, match=r"belongs to user \d+ and this process to 12345"):
        check_owned(checkpoints)
    monkeypatch.setenv("RAYCOMPLETE_TRUST_CHECKPOINTS", "1")
    check_owned(checkpoints)


def test_a_restore_asks_first(checkpoints: Path) -> None:
    """Refused before a single pickle is opened: the engine would fail this test if it were asked."""

    class Untouched:
        def __getattr__(self, name: str) -> Any:
            pytest.fail(f"engine.{name} was asked for")

    checkpoints.chmod(0o777)
    with pytest.raises(CheckpointError, match="other users may write"):
        saving.restore(Untouched(), checkpoints)


def test_a_run_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "base", 0)
    train = TrainConfig(keep_checkpoints=2)
    count = count_parameters(model)
    assert count == sum(parameter.numel() for parameter in load_model(model, "float32").parameters())
    needed = 3 * checkpoint_bytes(count, "float32", train) + 3 * 4 * count  # weights: student, best and next best

    def free(amount: int) -> Any:
        monkeypatch.setattr(saving, "free_bytes", lambda folder: amount)

    free(needed)
    check_space(tmp_path / "runs" / "new", model, "float32", train)
    free(needed - 1)
    with pytest.raises(SetupError, match=r"needs about .* \(3 checkpoints of .* lower train.keep_checkpoints"):
        check_space(tmp_path / "runs" / "new", model, "float32", train)
    # Checkpoints of a run that is resumed take their room already.
    write_text(tmp_path / "runs" / "old" / "checkpoints" / "step-000001" / "complete.json", "{}")
    check_space(tmp_path / "runs" / "old", model, "float32", train)


def test_weights_of_the_best_step_come_back_bit_for_bit(tmp_path: Path) -> None:
    train = TrainConfig()
    model = load_model(make_model(tmp_path / "model", 0), "float32")
    best = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_weights(model, tmp_path / "best", 3, train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert is_whole(tmp_path / "best", 3)
    restore_weights(model, tmp_path / "best", 3, train)
    assert all(torch.equal(weight, best[name]) for name, weight in model.state_dict().items())
    flip(tmp_path / "best" / "step-000003" / "weights.safetensors")
    assert not is_whole(tmp_path / "best", 3)
    with pytest.raises(WorkError, match="another sha256"):
        restore_weights(model, tmp_path / "best", 3, train)
