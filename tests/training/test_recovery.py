"""Real Ray Train runs: workers are killed, the disk fills up, someone asks to stop. Nothing finished is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig
from raycomplete.runtime.errors import DiskFullError, ProcessDiedError, StoppedError
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit
from tests.training.tiny import LocalScores, make_job

pytestmark = pytest.mark.slow


class DeadlyScores(LocalScores):
    """Kills the worker that asks for the n-th step of an attempt, as often as there are `lives`."""

    def __init__(self, path: Path, lives: Path, step: int) -> None:
        super().__init__(path)
        self.lives, self.step, self.asked = lives, step, 0

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        self.asked += 1
        lives = sorted(self.lives.iterdir())
        if self.asked == self.step and lives:
            try:
                lives[0].unlink()  # of two workers that come here, one dies
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().collect_tensors(reference)


class SlowScores(LocalScores):
    """Leaves time to ask for a stop."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        time.sleep(0.2)
        return super().collect_tensors(reference)


def settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 5,
        "lr": 1e-2,
        "warmup_steps": 1,
        "per_device_batch_size": 2,
        "loss_chunk_tokens": 16,
        "checkpoint_every": 2,
        "stall_timeout_s": 240.0,
    }
    return TrainConfig(**(values | changes))


def run(job: TrainJob, **options: Any) -> list[float]:
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0, **options)
    rows = read_metrics(job.metrics_file)
    assert [row["step"] for row in rows] == list(range(1, job.train.steps + 1))
    return [row["loss"] for row in rows]


def test_training_goes_on_after_a_worker_was_killed(ray_cluster: None, tmp_path: Path) -> None:
    """One of two workers is killed in step 4; the losses are those of a run that was left alone."""
    train = settings(num_workers=2, zero_stage=2, max_failures=1)
    expected = run(make_job(tmp_path / "undisturbed", train))

    folder = tmp_path / "killed"
    job = make_job(folder, train)
    lives = folder / "lives"
    lives.mkdir()
    job = replace(job, scorers={**job.scorers, "aligned": DeadlyScores(folder / "aligned", lives, step=4)})

    (lives / "1").touch()
    shown: list[int] = []
    assert run(job, on_step=lambda row: shown.append(row["step"])) == expected
    assert shown[-3:] == [3, 4, 5], "the steps after the checkpoint of step 2 are made again"
    assert len(job.failures_file.read_text().splitlines()) == 1


@pytest.mark.exhaustive
def test_a_worker_that_dies_too_often_ends_the_run_with_its_facts(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, settings(max_failures=1))
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(2):
        (lives / str(number)).touch()
    deadly = DeadlyScores(tmp_path / "aligned", lives, step=3)
    with pytest.raises(ProcessDiedError) as caught:
        run(replace(job, scorers={**job.scorers, "aligned": deadly}))
    error = caught.value
    assert str(error).startswith("Training worker 0 died after 4 finished steps. Training was started again 1 times")
    stats = dict(error.details())
    assert stats["who"] == "training worker 0"
    assert "killed by SIGKILL" in stats["likely cause"]
    assert stats["node"]
    assert Path(stats["log"]).exists()
    assert stats["kept"].startswith("the checkpoint of step 4 in ")


def test_a_stop_finishes_the_step_and_keeps_it(ray_cluster: None, tmp_path: Path) -> None:
    train = settings(num_workers=2, steps=60, checkpoint_every=50)
    job = make_job(tmp_path, train)
    job = replace(job, scorers={**job.scorers, "aligned": SlowScores(tmp_path / "aligned")})
    shown: list[int] = []
    with pytest.raises(StoppedError, match=r"after step (\d+) of 60; its checkpoint is in .* Resume with --resume"):
        fit(
            job,
            cpus_per_worker=0.5,
            gpus_per_worker=0,
            on_step=lambda row: shown.append(row["step"]),
            stopping=lambda: len(shown) >= 2,
        )
    done = len(read_metrics(job.metrics_file))
    assert 2 <= done < 60
    assert job.newest_checkpoint == done, "no finished step is lost"
    assert not job.stop_file.exists(), "nothing stops the run that goes on"
    assert not job.output.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs more rights than these tests have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.exhaustive
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(ray_cluster: None, small_disk: Path) -> None:
    job = make_job(small_disk, settings(num_workers=2, zero_stage=2, steps=12, checkpoint_every=1))
    job = replace(job, scorers={**job.scorers, "aligned": SlowScores(small_disk / "aligned")})
    filler = small_disk / "filler"

    def fill(row: dict[str, Any]) -> None:
        if row["step"] >= 2 and not filler.exists():
            with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(4096))

    with pytest.raises(DiskFullError, match=r"The disk is full: the .* of step \d+ could not be written to .* free\)"):
        run(job, on_step=fill)
    there = sorted(path.name for path in job.checkpoints.iterdir())
    whole = sorted(path.parent.name for path in job.checkpoints.glob("*/complete.json"))
    assert whole
    assert there == whole, "what was half-written is removed"
    filler.unlink()
    assert len(run(job)) == 12
