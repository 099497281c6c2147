"""Starts a training run on Ray Train, follows it with a limit on the wait, and explains what ended it.

A death is met with a restart from the newest checkpoint; an error would only come again and ends the run. Ray Train
sees one failed worker group in both cases, so `RestartAfterDeaths` decides in the process of its controller.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from raycomplete.runtime.errors import ProcessDiedError, RaycompleteError, StoppedError, WaitTimeoutError, WorkError
from raycomplete.runtime.metrics_file import MetricsReader, read_metrics
from raycomplete.runtime.ray_calls import free_resources, likely_cause, log_path
from raycomplete.runtime.signals import GRACE_S
from raycomplete.storage import integrity
from raycomplete.training.checkpoints import check_space
from raycomplete.training.job import TrainJob

_POLL_S = 0.5
_STALL_TIMEOUT_S = 1800.0  # longest time without a finished step
_STOP_S = GRACE_S - 2.0  # for the present step and its checkpoint; then it is left as it is
# Idle OpenMP threads sleep, after spinning for a moment: waking one through the kernel for each of the thousands of
# parallel regions of a step costs more. On 2 cores, layers of SmolLM2-135M's size ran .203 steps/s asleep at once, .249
# with this count and .272 with 5,000. Beside a second process this count costs nothing in training, but 20,000 makes
# layers of the organism's size train 1.6 times slower and read 32 tokens 15 times, so engines have no such count.
_BRIEF_SPIN = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
# A step makes and drops gigabytes of tensors. glibc hands each of them back to the system and gets it again as zeroed
# pages, which cost more than the arithmetic of the optimizer. With these a worker keeps what it once had. Threads keep
# arenas of their own: oneDNN allocates for every block of the backward pass of attention in bfloat16, and on one arena
# the threads wait for each other (SmolLM2-135M, 16 sequences of 96 tokens on 2 cores: 2.9 s backward instead of 1.7).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}

# Words of a worker whose peer is gone: gloo, NCCL, sockets.
_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|NCCL|Timed out waiting|timeout caused pair")


def fit(
    job: TrainJob,
    *,
    cpus_per_worker: float,
    gpus_per_worker: float,
    placement: str = "pack",
    on_step: Callable[[dict[str, Any]], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Trains, and returns when the student is written to `job.output`.

    Where a worker or its node dies, Ray Train starts all workers again from the newest checkpoint, up to
    `train.max_failures` times. An exception of a worker ends training. `placement` spreads the workers over nodes as
    Ray Train does: pack, spread, strict_pack or strict_spread. `on_step` gets each new row of metrics, after a restart
    some steps once more. Once `stopping` returns True the workers finish their step, write a checkpoint and end; where
    that takes long, they are left within the step, and the caller's `ray.shutdown` ends them.
    """
    check_space(job.folder, job.start, job.dtype, job.train)
    job.folder.mkdir(parents=True, exist_ok=True)
    job.stop_file.unlink(missing_ok=True)
    deaths_before = count_failures(job.failures_file)
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if job.use_gpu else {})
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **_BRIEF_SPIN}
    if not job.use_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(job.threads), "CUDA_VISIBLE_DEVICES": ""}
        environment |= KEEP_MEMORY
    trainer = TorchTrainer(
        _run,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo", timeout_s=int(_STALL_TIMEOUT_S)),
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
    """Runs on every worker, and imports DeepSpeed only there."""
    from raycomplete.training.worker import run

    return run(config)


def _follow(
    job: TrainJob,
    thread: threading.Thread,
    on_step: Callable[[dict[str, Any]], None] | None,
    stopping: Callable[[], bool],
) -> None:
    """Hands new rows of metrics to the caller until training ends or makes no progress for too long."""
    seen, deaths, last_change = 0, 0, time.monotonic()
    metrics = MetricsReader(job.metrics_file)
    stop_at = math.inf
    while True:
        alive = thread.is_alive()
        rows, died = metrics.rows(), count_failures(job.failures_file)
        if (len(rows), died) != (seen, deaths):
            last_change = time.monotonic()
        for row in rows[seen:]:
            if on_step is not None:
                on_step(row)
        # After a restart the file is shorter: its last steps are made and shown again.
        seen, deaths = len(rows), died
        if not alive:
            return
        if stopping() and stop_at == math.inf:
            job.stop_file.touch()
            # Where the newest checkpoint has every finished step, there is nothing to wait for.
            stop_at = time.monotonic() + (_STOP_S if seen > job.newest_checkpoint else 0.0)
        if time.monotonic() >= stop_at:
            job.stop_file.unlink(missing_ok=True)
            steps, checkpoint = job.train.steps, job.newest_checkpoint
            where = f"within step {seen + 1} of {steps}" if seen < steps else "after the last step"
            saved = (
                f"the checkpoint of step {checkpoint}" if checkpoint else "its first step: there is no checkpoint yet"
            )
            problem = f"Training was stopped on request {where}; it goes on from {saved}."
            raise StoppedError(problem, "Resume with --resume.")
        if time.monotonic() - last_change > _STALL_TIMEOUT_S:
            raise WaitTimeoutError(
                f"Training finished no step for {_STALL_TIMEOUT_S:.0f} s (last finished: {seen}; workers died "
                f"{deaths} times; {job.train.num_workers} workers wanted, free in the cluster: {free_resources()}).",
                "The workers may wait for resources or for a scorer: see the Ray logs. Resume with --resume.",
            )
        thread.join(_POLL_S)


class RaisedError(Exception):
    """A worker's own exception, on its way through Ray Train's controller."""

    def __init__(self, rank: int, cause: BaseException) -> None:
        super().__init__(rank, cause)
        self.rank, self.cause = rank, cause


class RestartAfterDeaths(UserCallback):
    """Ends the run where a worker raised an exception, and notes a death in `failures.jsonl`."""

    def __init__(self, job: TrainJob) -> None:
        self._job = replace(job, scorers={}, student_engines=None)  # only its paths: handles would keep actors alive

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides; a RaisedError ends the run without a restart."""
        raised = raised_by(worker_exceptions)
        if raised is not None:
            raise RaisedError(*raised)
        row = {
            "time": time.time(),
            "finished_steps": len(read_metrics(self._job.metrics_file)),
            "checkpoint": self._job.newest_checkpoint,
            "workers": [{"rank": rank} | death_report(error) for rank, error in sorted(worker_exceptions.items())],
        }
        with self._job.failures_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def raised_by(failures: Mapping[int, BaseException]) -> tuple[int, BaseException] | None:
    """The first worker that failed by itself, and its exception; None where a worker, or what it talked to, died."""
    if any(is_death(error) for error in failures.values()):
        return None
    for rank, error in sorted(failures.items()):
        if isinstance(error, RaycompleteError) or not _LOST_PEER.search(str(error)):
            return rank, error
    return None


def is_death(error: BaseException) -> bool:
    """True where the process of a worker is gone, or has not answered for so long that Ray gives it up."""
    died = isinstance(getattr(error, "health_check_failure", None), RayActorError)
    return died or type(error).__name__ == "WorkerHealthCheckTimeoutError"


def death_report(error: BaseException) -> dict[str, str]:
    """Node, likely cause and log of a worker, as far as Ray's error message tells them."""
    text = str(error)

    def named(name: str) -> str:
        found = re.search(rf"\b{name}='([^']+)'", text)
        return found.group(1) if found else ""

    cause = likely_cause(text) or ("the connection to a worker that died was lost" if _LOST_PEER.search(text) else "")
    return {"node": named("node_ip"), "cause": cause, "log": named("log_file_path")}


def explain(error: BaseException, job: TrainJob, *, restarts: int = 0) -> RaycompleteError:
    """Finds what ended a run, after some restarts, inside the errors that Ray wraps around it, and names its remedy."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    controller = getattr(error, "controller_failure", None)
    raised = (controller.rank, controller.cause) if isinstance(controller, RaisedError) else raised_by(failures)
    if raised is None and (failures or isinstance(error, RayActorError)):
        return _death(failures, error, job, restarts)
    rank, cause = raised or (None, error)
    while not isinstance(cause, RaycompleteError):  # whose own `cause` is a word
        inner = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(inner, BaseException) or inner is cause:
            break
        cause = inner
    if isinstance(cause, RaycompleteError):
        return cause
    where = "training" if rank is None else f"training worker {rank}"
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return WorkError(
        f"The {where} failed after {len(read_metrics(job.metrics_file))} finished steps "
        f"({lines[-1] if lines else type(cause).__name__}).",
        f"Checkpoints are in {os.path.relpath(job.checkpoints)}; resume with --resume.",
    )


def _death(
    failures: Mapping[int, BaseException], error: BaseException, job: TrainJob, restarts: int
) -> ProcessDiedError:
    # Where no death was seen, a worker that lost its peer is the only witness.
    dead = {rank: failure for rank, failure in failures.items() if is_death(failure)} or dict(failures)
    ranks = sorted(dead)
    role = f"training worker {' and '.join(map(str, ranks))}" if ranks else "the controller of Ray Train"
    stats = death_report(dead[ranks[0]] if ranks else error)
    step = job.newest_checkpoint
    saved = f"the checkpoint of step {step} in {os.path.relpath(job.checkpoints)}"
    again = f" Training was started again {restarts} times before (train.max_failures)." if restarts else ""
    return ProcessDiedError(
        f"{role[0].upper()}{role[1:]} died after {len(read_metrics(job.metrics_file))} finished steps.{again}",
        "Resume with --resume.",
        role=role,
        node=stats["node"],
        cause=stats["cause"],
        log_path=stats["log"] or log_path(""),
        saved=saved if step else "the samples; there is no checkpoint yet",
    )


def count_failures(path: Path) -> int:
    """Number of deaths in a run so far."""
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
