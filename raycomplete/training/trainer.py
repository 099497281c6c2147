"""Starts a training run on Ray Train and waits for it with a limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raycomplete.errors import RaycompleteError, WaitTimeoutError, WorkError
from raycomplete.training.job import TrainJob
from raycomplete.training.metrics import read_metrics

_POLL_S = 0.5
# A step makes and drops gigabytes of tensors. glibc hands each of them back to the system and gets it again as zeroed
# pages, which cost more than the arithmetic of the optimizer. With these a worker keeps what it once had.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}


def fit(
    job: TrainJob,
    *,
    cpus_per_worker: float,
    gpus_per_worker: float,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains, and returns when the student stands in `job.output`.

    Args:
        job: What to train.
        cpus_per_worker: Logical CPUs that each worker reserves.
        gpus_per_worker: GPUs that each worker reserves, where `job.use_gpu`.
        on_step: Called in this process with each new row of metrics.

    Raises:
        WaitTimeoutError: No step was finished within `train.stall_timeout_s`.
        WorkError: A worker failed; finished checkpoints are kept.
    """
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
            num_workers=job.train.num_workers, use_gpu=job.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(job.folder.resolve()),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    outcome: dict[str, BaseException] = {}

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the waiting thread below
            outcome["error"] = error

    thread = threading.Thread(target=work, name="ray-train-fit", daemon=True)
    thread.start()
    _follow(job, thread, on_step)
    if "error" in outcome:
        raise _explain(outcome["error"], job) from outcome["error"]


def _run(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker; only there is DeepSpeed imported."""
    from raycomplete.training.worker import run

    run(config)


def _follow(job: TrainJob, thread: threading.Thread, on_step: Callable[[dict[str, Any]], None] | None) -> None:
    """Hands new metrics rows to the caller until training ends or stands still for too long."""
    seen, last_change = 0, time.monotonic()
    while True:
        alive = thread.is_alive()
        rows = read_metrics(job.metrics_file)
        if len(rows) != seen:
            last_change = time.monotonic()
        for row in rows[seen:]:
            if on_step is not None:
                on_step(row)
        seen = len(rows)
        if not alive:
            return
        if time.monotonic() - last_change > job.train.stall_timeout_s:
            raise WaitTimeoutError(
                f"Training finished no step for {job.train.stall_timeout_s:.0f} s (last finished: {seen}).",
                "The workers may wait for resources or for a scorer: see the Ray logs. Resume with --resume.",
            )
        thread.join(_POLL_S)


def _explain(error: BaseException, job: TrainJob) -> RaycompleteError:
    """The first worker's own error in one sentence; Ray wraps it several times."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    # When one worker dies its peers fail in their next collective; the cause is the one that is no lost connection.
    ranked = sorted(failures.items(), key=lambda item: ("onnection" in str(item[1]), item[0]))
    rank, cause = ranked[0] if ranked else (None, error)
    while cause.__cause__ is not None or getattr(cause, "cause", None) is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if inner is None or inner is cause:
            break
        cause = inner
    where = "training" if rank is None else f"training worker {rank}"
    if isinstance(cause, RaycompleteError):
        return cause
    done = len(read_metrics(job.metrics_file))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return WorkError(
        f"The {where} failed after {done} finished steps ({lines[-1] if lines else type(cause).__name__}).",
        f"Checkpoints are in {os.path.relpath(job.checkpoints)}; resume with --resume.",
    )
