"""A real training whose disk is lost, or damaged, goes on to the very same losses and weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig, TrainConfig, parse
from raycomplete.data.checkpoints import load_model
from raycomplete.engines.run import OutputFolder
from raycomplete.runtime.console import Console
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.storage.mirror import Manifest
from raycomplete.storage.remote import Remote
from raycomplete.training.trainer import fit
from tests.storage.conftest import s3_uri
from tests.storage.test_integrity import flip
from tests.training.tiny import make_job

pytestmark = pytest.mark.slow

TRAIN = TrainConfig(
    steps=4,
    lr=1e-2,
    warmup_steps=1,
    per_device_batch_size=2,
    checkpoint_every=2,
)


@stored()
def training(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """The training part of `raycomplete train`, on two tiny models beside the run folder."""
    folder = OutputFolder(config, same=("models", "data", "train"), resume=resume).open()
    models = config.output.root / "models"
    models.mkdir(parents=True, exist_ok=True)
    job = make_job(models, config.train)
    if not (folder / "samples.jsonl").is_file():
        shutil.copy(job.samples, folder / "samples.jsonl")
    own = {"folder": folder.resolve(), "output": folder.resolve() / "student", "samples": folder / "samples.jsonl"}
    fit(replace(job, **own), cpus_per_worker=0.5, gpus_per_worker=0)
    return folder


def outcome(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"], row["lr"]) for row in rows], load_model(
        folder / "student", "float32"
    ).state_dict()


def test_a_lost_and_a_damaged_disk_change_no_bit(ray_cluster: None, s3_server: str, tmp_path: Path) -> None:
    uri = s3_uri(s3_server, "lost-disk")
    tree = {
        "models": {"base": "organism:base", "aligned": "organism:aligned"},
        "data": {"source": "organism"},
        "train": TRAIN.model_dump(mode="json"),
        "output": {"root": str(tmp_path), "storage": uri},
    }
    config, console = parse(tree, "test"), Console(quiet=True)
    folder = training(config, console=console)
    rows, weights = outcome(folder)
    assert [row[0] for row in rows] == [1, 2, 3, 4]

    # As after a machine that was lost in step 4: the disk is gone, and of that checkpoint no manifest was written.
    shutil.rmtree(folder)
    manifest = Manifest(Remote(str(config.output.mirror)))
    assert {"checkpoints/step-000002", "checkpoints/step-000004", "student", "files"} == {*manifest.pieces}
    manifest.withdraw("checkpoints/step-000004", "student")
    training(config, resume=True, console=console)
    again, weights_again = outcome(folder)
    assert again == rows
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)

    # A flipped bit in the newest checkpoint, and no storage: the trainer itself goes back to the one before.
    shutil.rmtree(folder / "student")
    flip(next((folder / "checkpoints" / "step-000004" / "state").glob("*.pt")))
    job = replace(make_job(tmp_path / "models", TRAIN), folder=folder, output=folder / "student")
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    damaged, weights_damaged = outcome(folder)
    assert damaged == rows
    assert all(torch.equal(weights[name], weights_damaged[name]) for name in weights)
