"""Starts a training run on Ray Train and waits for it with a limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raycomplete.runtime.errors import StoppedError, WaitTimeoutError
from raycomplete.runtime.metrics_file import MetricsReader
from raycomplete.runtime.ray_calls import free_resources
from raycomplete.storage import integrity
from raycomplete.training.disk_space import check_space
from raycomplete.training.failures import RestartAfterDeaths, count_failures, explain
from raycomplete.training.job import TrainJob

_POLL_S = 0.5
# A step makes and drops gigabytes of tensors. glibc hands each of them back to the system and gets it again as zeroed
# pages, which cost more than the arithmetic of the optimizer. With these a worker keeps what it once had.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}

OnStep = Callable[[dict[str, Any]], None]


def fit(
    job: TrainJob,
    *,
    cpus_per_worker: float,
    gpus_per_worker: float,
    placement: str = "pack",
    on_step: OnStep | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Trains, and returns when the student stands in `job.output`.

    Where a worker or its node dies, Ray Train starts all workers anew, and they go on from the newest checkpoint, up to
    `train.max_failures` times. An exception of a worker ends training: it would only come again.

    Args:
        job: What to train.
        cpus_per_worker: Logical CPUs that each worker reserves.
        gpus_per_worker: GPUs that each worker reserves, where `job.use_gpu`.
        placement: How Ray Train spreads the workers over nodes: pack, spread, strict_pack or strict_spread.
        on_step: Called in this process with each new row of metrics; after a restart with some steps once more.
        stopping: Asked twice a second; True lets the workers finish their step, write a checkpoint and leave.

    Raises:
        SetupError: The disk has no room for the checkpoints.
        StoppedError: `stopping` said so, or someone made `job.stop_file`.
        WaitTimeoutError: No step was finished within `train.stall_timeout_s`.
        ProcessDiedError: Workers died more often than `train.max_failures`.
        WorkError: A worker failed; finished checkpoints are kept.
    """
    check_space(job.folder, job.start, job.dtype, job.train)
    job.folder.mkdir(parents=True, exist_ok=True)
    job.stop_file.unlink(missing_ok=True)
    deaths_before = count_failures(job.failures_file)
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if job.use_gpu else {})
    environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not job.use_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(job.threads), "CUDA_VISIBLE_DEVICES": ""}
        environment |= KEEP_MEMORY
    trainer = TorchTrainer(
        _run,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo", timeout_s=int(job.train.stall_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=job.train.num_workers,
            use_gpu=job.use_gpu,
            resources_per_worker=resources,
            placement_strategy=placement.upper(),
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(job.folder.resolve()),
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            callbacks=[RestartAfterDeaths(job)],
            worker_runtime_env={"env_vars": environment},
        ),
    )
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:  # handed to the waiting thread below
            outcome["error"] = error

    thread = threading.Thread(target=work, name="ray-train-fit", daemon=True)
    thread.start()
    _follow(job, thread, on_step, stopping)
    job.stop_file.unlink(missing_ok=True)
    if "error" in outcome:
        integrity.drop_unfinished(job.checkpoints)  # workers are gone; on a full disk its room is wanted
        deaths = count_failures(job.failures_file) - deaths_before
        raise explain(outcome["error"], job, restarts=max(deaths - 1, 0)) from outcome["error"]
    stopped_after = outcome["result"]["stopped_after"]
    if stopped_after is not None:
        raise StoppedError(
            f"Training was stopped on request after step {stopped_after} of {job.train.steps}; its checkpoint is in "
            f"{os.path.relpath(job.checkpoints)}.",
            "Resume with --resume.",
        )


def _run(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on every worker; only there is DeepSpeed imported."""
    from raycomplete.training.worker import run

    return run(config)


def _follow(job: TrainJob, thread: threading.Thread, on_step: OnStep | None, stopping: Callable[[], bool]) -> None:
    """Hands new metrics rows to the caller until training ends or stands still for too long."""
    seen, deaths, last_change = 0, 0, time.monotonic()
    metrics = MetricsReader(job.metrics_file)
    while True:
        alive = thread.is_alive()
        rows, died = metrics.rows(), count_failures(job.failures_file)
        if (len(rows), died) != (seen, deaths):
            last_change = time.monotonic()
        for row in rows[seen:]:
            if on_step is not None:
                on_step(row)
        # After a restart the file is shorter: its last steps are made again, and shown again.
        seen, deaths = len(rows), died
        if not alive:
            return
        if stopping() and not job.stop_file.exists():
            job.stop_file.touch()
        if time.monotonic() - last_change > job.train.stall_timeout_s:
            raise WaitTimeoutError(
                f"Training finished no step for {job.train.stall_timeout_s:.0f} s (last finished: {seen}; workers died "
                f"{deaths} times; {job.train.num_workers} workers wanted, free in the cluster: {free_resources()}).",
                "The workers may wait for resources or for a scorer: see the Ray logs. Resume with --resume.",
            )
        thread.join(_POLL_S)
