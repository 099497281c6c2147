"""The process of one evaluation, and what its runner makes of it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.config import RunConfig
from raycomplete.runtime.errors import RefusedError, WaitTimeoutError, WorkError
from raycomplete.serving import process
from raycomplete.serving.schemas import EvaluationRequest
from tests.serving.conftest import make_config

Child = Callable[[Connection], None]


def follow(child: Child, tmp_path: Path, cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
    """Progress of an evaluation whose process speaks as `child` does."""
    told: list[Any] = []
    ours, theirs = multiprocessing.Pipe()

    def speak() -> None:
        with theirs:
            child(theirs)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    process.follow(ours, told.append, cancelled)
    return told


def says(*messages: Any) -> Child:
    def child(connection: Connection) -> None:
        for message in messages:
            connection.send(message)

    return child


def test_progress_comes_through_the_pipe(tmp_path: Path) -> None:
    assert follow(says({"done": 1}, {"done": 2}, None), tmp_path) == [{"done": 1}, {"done": 2}]


@pytest.mark.parametrize("kind", [RefusedError, WorkError])
def test_errors_come_through_the_pipe(kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind, match=r"It is wrong\. Mend it\."):
        follow(says(kind("It is wrong.", "Mend it.")), tmp_path)


def test_the_end_of_the_pipe_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(EOFError):
        follow(says({"done": 1}), tmp_path)


def test_cancelling_is_told_and_then_enforced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def polite(connection: Connection) -> None:
        connection.send(WorkError(f"I was told to {connection.recv()}."))

    with pytest.raises(WorkError, match="told to cancel"):
        follow(polite, tmp_path, cancelled=lambda: True)
    monkeypatch.setattr(process, "_CANCEL_GRACE_S", 0.3)
    with pytest.raises(WorkError, match=r"in the middle of a batch\. Finished trials are kept"):
        follow(lambda _: time.sleep(5), tmp_path, cancelled=lambda: True)


def obey(config: RunConfig, roles: list[str], on_progress: Any, cancelled: Callable[[], bool]) -> None:
    """An evaluation in a real process, which does what its roles say."""
    print("noise", flush=True)
    on_progress({"token": os.environ.get("RAYCOMPLETE_TOKEN"), "address": config.cluster.address})
    if "student" in roles:
        raise RefusedError("The student is missing.", "Train it.")
    if "aligned" in roles:
        os._exit(9)
    while not cancelled():
        time.sleep(0.05)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> process.ProcessBackend:
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "a-secret-of-the-cluster")
    context = SimpleNamespace(gcs_address="head:6379")
    monkeypatch.setattr(process.ray, "get_runtime_context", lambda: context)
    return process.ProcessBackend(make_config(tmp_path), obey)


def test_a_real_process_tells_progress_obeys_and_does_not_know_the_token(
    backend: process.ProcessBackend, tmp_path: Path
) -> None:
    told: list[Any] = []
    folder = tmp_path / "evaluations" / "x"
    folder.parent.mkdir()
    backend(EvaluationRequest(roles=["base"]), folder, told.append, lambda: bool(told))
    assert told == [{"token": None, "address": "head:6379"}]
    log = folder.with_name("x.log")
    assert "noise" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError, match="The student is missing"):
        backend(EvaluationRequest(roles=["student"]), folder, told.append, lambda: False)
    with pytest.raises(WorkError, match=r"ended with code 9\. See .*x\.log"):
        backend(EvaluationRequest(roles=["aligned"]), folder, told.append, lambda: False)


def test_only_one_process_writes_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LOCK_TIMEOUT_S", 0.3)
    folder = tmp_path / "evaluations" / "x"
    with (
        process.only_writer(folder),
        pytest.raises(WaitTimeoutError, match="still writes into"),
        process.only_writer(folder),
    ):
        pass
    with process.only_writer(folder):
        assert not folder.exists(), "the lock lies beside the folder, which the pipeline wants empty"


def test_the_process_ends_with_its_runner() -> None:
    script = (
        "import multiprocessing, threading\n"
        "from raycomplete.serving.process import _obey\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        "cancel = threading.Event()\n"
        "ours.send('cancel'); ours.close()\n"
        "_obey(theirs, cancel)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 3
