"""Deaths and errors are told apart by what Ray Train hands over, in Ray's own words."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision

from raycomplete.config import TrainConfig
from raycomplete.runtime.errors import ProcessDiedError, StoppedError, WorkError
from raycomplete.training import trainer
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import RaisedError, RestartAfterDeaths, explain
from tests.training.tiny import make_job

INFO = "Worker info: Worker(metadata=ActorMetadata(node_ip='10.0.0.7', pid=7)\nlog_file_path='/logs/w.log',)"
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
KILLED = "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) OOM"


def died(words: str = KILLED) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError(f"{INFO}\n{words}", ActorDiedError())


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    job = make_job(tmp_path, TrainConfig())
    job.metrics_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    for step, is_whole in ((2, True), (3, False)):
        folder = job.checkpoints / f"step-{step:06d}"
        folder.mkdir(parents=True)
        if is_whole:
            (folder / "complete.json").write_text("{}")
    return job


@pytest.mark.parametrize("failures", [{1: died()}, {0: LOST, 1: died()}, {0: LOST}, {0: WorkError("late"), 1: died()}])
def test_a_death_is_noted_and_left_to_ray_train(failures: dict[int, Exception], job: TrainJob) -> None:
    RestartAfterDeaths(job).after_exception(None, failures)
    (row,) = (json.loads(line) for line in job.failures_file.read_text().splitlines())
    assert (row["finished_steps"], row["checkpoint"]) == (3, 2)
    assert [worker["rank"] for worker in row["workers"]] == sorted(failures)


@pytest.mark.parametrize("failures", [{0: ValueError("a bug")}, {0: LOST, 1: ValueError("a bug")}])
def test_an_error_is_not_tried_again(failures: dict[int, Exception], job: TrainJob) -> None:
    with pytest.raises(RaisedError) as caught:
        RestartAfterDeaths(job).after_exception(None, failures)
    assert not job.failures_file.exists()
    error = explain(ControllerError(caught.value), job)
    assert type(error) is WorkError
    assert f"training worker {max(failures)} failed after 3 finished steps (a bug)" in str(error)


def test_ray_train_obeys() -> None:
    """Its own policy restarts after a death as often as the run file says, and never after an error."""
    policy = DefaultFailurePolicy(FailureConfig(max_failures=1))
    assert policy.make_decision(ControllerError(RaisedError(0, ValueError()))) is FailureDecision.RAISE
    death = WorkerGroupError("", {1: died()})
    assert [policy.make_decision(death) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_a_death_that_ends_the_run_is_told_in_full(job: TrainJob) -> None:
    error = explain(WorkerGroupError("", {0: LOST, 1: died()}), job, restarts=3)
    assert isinstance(error, ProcessDiedError)
    assert str(error).startswith("Training worker 1 died after 3 finished steps. Training was started again 3 times")
    stats = dict(error.details())
    assert stats["who"] == "training worker 1"
    assert stats["node"] == "10.0.0.7"
    assert stats["log"] == "/logs/w.log"
    assert "killed by SIGKILL" in stats["likely cause"]
    assert stats["kept"].startswith("the checkpoint of step 2 in ")
    assert stats["go on"] == "Resume with --resume."


def followed(job: TrainJob) -> str:
    """Follows a training that is asked to stop at once, and returns the sentence with which it is left."""
    workers = threading.Thread(target=threading.Event().wait, args=(99.0,), daemon=True)
    workers.start()
    with pytest.raises(StoppedError) as caught:
        trainer._follow(job, workers, None, lambda: True)
    assert not job.stop_file.exists(), "a later checkpoint than the sentence names"
    return str(caught.value)


def test_a_long_step_is_left_from_its_last_checkpoint(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 is finished and in no checkpoint: workers get a while to write one."""
    monkeypatch.setattr(trainer, "_STOP_S", 1.0)
    started = time.monotonic()
    said = followed(job)
    assert said.startswith("Training was stopped on request within step 4 of ")
    assert "it goes on from the checkpoint of step 2" in said
    assert 0.9 < time.monotonic() - started < 20


def test_nothing_is_waited_for_where_every_step_is_saved(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_STOP_S", 60.0)
    (job.checkpoints / "step-000003" / "complete.json").write_text("{}")
    started = time.monotonic()
    assert "it goes on from the checkpoint of step 3" in followed(job)
    job.metrics_file.unlink()
    for folder in job.checkpoints.iterdir():
        (folder / "complete.json").unlink(missing_ok=True)
    assert "within step 1 of " in (said := followed(job))
    assert "there is no checkpoint yet" in said
    assert time.monotonic() - started < 20
