"""Resuming after any step is as if the run had never stopped: losses and weights bit for bit on CPU.

Eleven resumes of a run of twelve steps take minutes: one, at the end of an epoch, is always made, all of them in
`make test-all`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import RolloutConfig, TrainConfig, ValidationConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.methods.registry import DepthConfig
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit
from tests.training.tiny import LocalStudentEngines, completion, make_job, steered

pytestmark = pytest.mark.slow

STEPS = 12
# 10 samples of each kind in batches of 4: epochs end within steps 3 and 8, and with steps 5 and 10.
EVERY = range(1, STEPS)
FEW = (5,)
ROLLOUT = RolloutConfig(
    on_policy=True, max_student_tokens=4, max_refusal_tokens=4, anchor_on_policy=0.5, sync_every=2, lookahead=1
)
# Clocks differ from run to run.
MEASURED = {"seconds", "tokens_per_s", "teacher_wait_s", "rollout_wait_s", "sync_s", "validation_s", "peak_memory_gib"}


def off_policy(folder: Path) -> TrainJob:
    return steered(make_job(folder, settings()))


def on_policy(folder: Path) -> TrainJob:
    method = completion(depth=DepthConfig(min=1, max=8, bins=4, measure="compliance"))
    job = steered(make_job(folder, settings(), method))
    return replace(job, rollout=ROLLOUT, student_engines=LocalStudentEngines(job.start, ROLLOUT.max_student_tokens))


def settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 3,
        "per_device_batch_size": 4,
        "loss_chunk_tokens": 64,
        "checkpoint_every": 1,
        "keep_checkpoints": STEPS,
        "stall_timeout_s": 240.0,
        # A best step before and after the resume, and an anchor weight that moves at each measurement.
        "validation": ValidationConfig(every=2, depths=[0, 4], max_tokens=6, kl_budget=0.5),
    }
    return TrainConfig(**(values | changes))


def run(job: TrainJob) -> list[dict[str, Any]]:
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    rows = [
        {name: value for name, value in row.items() if name not in MEASURED and name != "sync"}
        for row in read_metrics(job.metrics_file)
    ]
    for row in rows:  # the best step so far is that of the folder `best`, of which a test has only the last one
        row.get("validation", {}).pop("best_step", None)
    return rows


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(job.output, "float32").state_dict()
    return state


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(off_policy, FEW, id="off-policy"),
        pytest.param(off_policy, EVERY, marks=pytest.mark.exhaustive, id="off-policy, every step"),
        pytest.param(on_policy, EVERY, marks=pytest.mark.exhaustive, id="on-policy, every step"),
    ],
)
def test_losses_are_those_of_the_uninterrupted_run(
    ray_cluster: None, make: Callable[[Path], TrainJob], steps: range | tuple[int, ...], tmp_path: Path
) -> None:
    whole = make(tmp_path / "whole")
    expected = run(whole)
    student = weights(whole)
    for step in steps:
        job = make(tmp_path / f"resumed-{step}")
        shutil.copytree(whole.checkpoints, job.checkpoints)
        shutil.copytree(whole.best_checkpoint, job.best_checkpoint)
        shutil.copy(whole.metrics_file, job.metrics_file)
        for checkpoint in sorted(job.checkpoints.iterdir())[step:]:
            shutil.rmtree(checkpoint)
        assert job.newest_checkpoint == step
        assert run(job) == expected, f"resumed after step {step}"
        assert all(torch.equal(student[name], value) for name, value in weights(job).items())
        shutil.rmtree(job.folder)
