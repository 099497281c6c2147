"""Tells deaths from errors. A death is met with a restart from the newest checkpoint; an error would only come again.

Ray Train sees one failed worker group in both cases and would restart both. Its callback decides here, in the process
of Ray Train's controller, and the trainer explains here what ended a run.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from raycomplete.runtime.errors import ProcessDiedError, RaycompleteError, WorkError
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.runtime.ray_calls import likely_cause, log_path
from raycomplete.training.job import TrainJob

# What a worker says whose peer is gone: gloo, NCCL, sockets.
_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|NCCL|Timed out waiting|timeout caused pair")
_RESUME = "Resume with --resume."


class RaisedError(Exception):
    """A worker's own exception, on its way through Ray Train's controller.

    Args:
        rank: Of the worker.
        cause: What it raised.
    """

    def __init__(self, rank: int, cause: BaseException) -> None:
        super().__init__(rank, cause)
        self.rank, self.cause = rank, cause


class RestartAfterDeaths(UserCallback):
    """Ends the run where a worker raised an exception, and notes a death in `failures.jsonl`.

    Args:
        job: Of the run.
    """

    def __init__(self, job: TrainJob) -> None:
        self._job = replace(job, sources={}, policy=None)  # only its paths: handles would keep actors alive

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides; what is raised here ends the run without a restart.

        Raises:
            RaisedError: A worker failed by an exception of its own.
        """
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
    own = ((rank, error) for rank, error in sorted(failures.items()) if not _lost_its_peer(error))
    return next(own, None)


def is_death(error: BaseException) -> bool:
    """Whether the process of a worker is gone, or has not answered for so long that Ray gives it up."""
    died = isinstance(getattr(error, "health_check_failure", None), RayActorError)
    return died or type(error).__name__ == "WorkerHealthCheckTimeoutError"


def _lost_its_peer(error: BaseException) -> bool:
    return not isinstance(error, RaycompleteError) and _LOST_PEER.search(str(error)) is not None


def death_report(error: BaseException) -> dict[str, str]:
    """Node, likely cause and log of a worker, as far as Ray's words tell."""
    text = str(error)

    def named(name: str) -> str:
        found = re.search(rf"\b{name}='([^']+)'", text)
        return found.group(1) if found else ""

    cause = likely_cause(text) or ("the connection to a worker that died was lost" if _LOST_PEER.search(text) else "")
    return {"node": named("node_ip"), "cause": cause, "log": named("log_file_path")}


def explain(error: BaseException, job: TrainJob, *, restarts: int = 0) -> RaycompleteError:
    """What ended a run, with its remedy; Ray wraps it several times.

    Args:
        error: What Ray Train raised.
        job: Of the run.
        restarts: How often it went on after a death before.
    """
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
    # Where nobody was seen dying, a worker that lost its peer is the only witness.
    dead = {rank: failure for rank, failure in failures.items() if is_death(failure)} or dict(failures)
    ranks = sorted(dead)
    role = f"training worker {' and '.join(map(str, ranks))}" if ranks else "the controller of Ray Train"
    stats = death_report(dead[ranks[0]] if ranks else error)
    again = f" Training was started again {restarts} times before (train.max_failures)." if restarts else ""
    return ProcessDiedError(
        f"{role[0].upper()}{role[1:]} died after {len(read_metrics(job.metrics_file))} finished steps.{again}",
        _RESUME,
        role=role,
        node=stats["node"],
        cause=stats["cause"],
        log_path=stats["log"] or log_path(""),
        saved=_saved(job),
    )


def _saved(job: TrainJob) -> str:
    step = job.newest_checkpoint
    if not step:
        return "the samples; there is no checkpoint yet"
    return f"the checkpoint of step {step} in {os.path.relpath(job.checkpoints)}"


def count_failures(path: Path) -> int:
    """Deaths that a run met so far."""
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
