"""Rivals and the adversary of suffixes in the training loop: DeepSpeed, several sequences of an item, own passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig, ValidationConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import read_samples, write_samples
from raycomplete.methods.registry import parse_method
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.trainer import fit
from tests.training.tiny import make_job

pytestmark = pytest.mark.slow


SETTINGS: dict[str, Any] = {"completion": {"suffix_adversary": {"steps": 2}}}


def run(folder: Path, name: str, workers: int, lora_rank: int = 0) -> list[dict[str, Any]]:
    train = TrainConfig(
        steps=3,
        lr=1e-2,
        warmup_steps=1,
        num_workers=workers,
        per_device_batch_size=4,
        checkpoint_every=3,
        validation=ValidationConfig(every=0),
        lora_rank=lora_rank,
    )
    sizes = {"anchor_batch_size": 4, "recovery_batch_size": 4, "depth": {"max": 16}}
    method = parse_method({"name": name} | sizes | SETTINGS.get(name, {}))
    job = make_job(folder, train, method)
    if method.moves_suffixes:
        samples = read_samples(job.samples)
        recovery = [replace(sample, suffix=(len(sample.prompt_ids) - 2, 2)) for sample in samples.recovery]
        write_samples(job.samples, replace(samples, recovery=tuple(recovery)))
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    return read_metrics(job.metrics_file)


@pytest.mark.parametrize(
    ("name", "lora_rank"),
    [
        ("circuit_breakers", 4),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [("completion", 0), ("door", 0), ("presto", 0)]
        ),
    ],
)
def test_a_step_is_the_same_on_one_worker_and_on_two(
    name: str, lora_rank: int, ray_cluster: None, tmp_path: Path
) -> None:
    found = [run(tmp_path / str(workers), name, workers, lora_rank) for workers in (1, 2)]
    for one, two in zip(*found, strict=True):
        losses = ("loss", *parse_method({"name": name}).loss_weights())
        assert {key: two[key] for key in losses} == pytest.approx({key: one[key] for key in losses}, rel=1e-3)
    start, student = (load_model(tmp_path / "1" / folder, "float32").state_dict() for folder in ("base", "student"))
    assert any(not torch.equal(start[key], student[key]) for key in start)


def test_latent_adversarial_training_takes_sound_steps_whose_loss_falls(ray_cluster: None, tmp_path: Path) -> None:
    rows = run(tmp_path, "latent_adversarial", 1)
    assert [row["bad_steps"] for row in rows] == [0, 0, 0]
    assert rows[-1]["loss"] < rows[0]["loss"]
