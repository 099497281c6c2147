"""Which checkpoint a resumed run goes on from, and which stay: the code around DeepSpeed, with one rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raycomplete.config import TrainConfig
from raycomplete.runtime.errors import WorkError
from raycomplete.training import deepspeed_engine as ds
from tests.storage.test_integrity import flip


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


def saved(folder: Path, *steps: int, keep: int | None = None, train: TrainConfig | None = None) -> Engine:
    engine = Engine()
    for engine.value in steps:
        ds.save(engine, folder, engine.value, {"sampler": engine.value}, keep, train)
    return engine


def test_a_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    engine = saved(tmp_path, 1, 2)
    engine.value = 9
    state = ds.restore(engine, tmp_path)
    assert state is not None
    assert (engine.value, state["step"], state["sampler"]) == (2, 2, 2)
    assert ds.restore(engine, tmp_path / "nothing") is None


def test_a_damaged_newest_one_gives_way_and_damage_everywhere_is_an_error(tmp_path: Path) -> None:
    engine = saved(tmp_path, 1, 2)
    flip(tmp_path / "step-000002" / "state" / "weights")
    state = ds.restore(engine, tmp_path)
    assert state is not None
    assert (engine.value, state["step"]) == (1, 1)
    flip(tmp_path / "step-000001" / "state" / "weights")
    with pytest.raises(
        WorkError, match=r"No checkpoint in .* is whole \(step-000001: state/weights has another sha256"
    ):
        ds.restore(engine, tmp_path)


def test_the_best_checkpoint_is_checked_as_well(tmp_path: Path) -> None:
    engine = saved(tmp_path, 1)
    assert ds.is_whole(tmp_path, 1)
    assert not ds.is_whole(tmp_path, 2)
    flip(tmp_path / "step-000001" / "state" / "weights")
    assert not ds.is_whole(tmp_path, 1)
    assert ds.is_whole(tmp_path, 1, hashed=False)
    with pytest.raises(WorkError, match="cannot be used: state/weights has another sha256"):
        ds.restore(engine, tmp_path, 1)


def test_retention_and_hashing_follow_the_run_file(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5, keep=1, train=TrainConfig(keep_every=2, checkpoint_hashes=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]
    files = json.loads((tmp_path / "step-000005" / "complete.json").read_text())["files"]
    assert files == {"state/weights": {"size": 1, "sha256": None}}
