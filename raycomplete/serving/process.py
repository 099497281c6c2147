"""One evaluation of the service in a process of its own, a Ray driver on the same cluster.

So it needs nothing that a replica lacks, its memory is given back when it ends, and what kills it does not kill the
service. It ends at once when its runner is gone, since the next runner takes over from what is on disk.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from raycomplete.config import RunConfig, parse
from raycomplete.runtime.errors import RaycompleteError, WorkError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.machine import let_idle_threads_sleep, within
from raycomplete.runtime.types import ModelRole
from raycomplete.serving.requests import TOKEN_VARIABLE, run_config
from raycomplete.serving.runner import Cancelled, OnProgress
from raycomplete.serving.schemas import EvaluationRequest

_CANCEL_GRACE_S = 10.0  # what a batch may take to end; finished trials are on disk already
_LOCK_TIMEOUT_S = 60.0
_KEPT = "Finished trials are kept; submit it again if it is still wanted."
_SPAWN = multiprocessing.get_context("spawn")

Evaluate = Callable[[RunConfig, list[ModelRole], OnProgress, Cancelled], object]


class ProcessBackend:
    """Evaluates (a `runner.Backend`) in a process of its own on the cluster of the replica that this is made in.

    Args:
        config: The server's run file.
        evaluate: Called in that process, so it must be a function of a module.
    """

    def __init__(self, config: RunConfig, evaluate: Evaluate) -> None:
        cluster = config.cluster.model_copy(update={"address": ray.get_runtime_context().gcs_address})
        self._config, self._evaluate = config.model_copy(update={"cluster": cluster}), evaluate

    def __call__(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        tree = run_config(self._config, request, folder).model_dump(mode="json")
        log = folder.with_name(f"{folder.name}.log")
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=work, args=(theirs, self._evaluate, tree, request.roles, log))
        process.start()
        theirs.close()
        try:
            follow(ours, on_progress, cancelled)
        except EOFError:
            process.join()
            raise WorkError(f"The evaluation's process ended with code {process.exitcode}.", f"See {log}.") from None
        finally:
            process.kill()  # whatever ends this call ends the process, so that no two write into one folder
            process.join()


def follow(connection: Connection, on_progress: OnProgress, cancelled: Cancelled) -> None:
    """Passes progress on until the process says how it ended; EOFError where it died instead."""
    give_up_at = float("inf")
    while True:
        if connection.poll(0.25):
            try:
                message = connection.recv()
            except OSError as error:  # torn where it was killed
                raise EOFError from error
            if message is None:
                return
            if isinstance(message, Exception):
                raise message
            on_progress(message)
        if cancelled() and give_up_at == float("inf"):
            give_up_at = time.monotonic() + _CANCEL_GRACE_S
            with suppress(BrokenPipeError):  # it has ended, and what it said last tells why
                connection.send("cancel")
        if time.monotonic() > give_up_at:
            raise WorkError("The evaluation was stopped in the middle of a batch.", _KEPT)


def work(connection: Connection, evaluate: Evaluate, tree: Any, roles: list[ModelRole], log: Path) -> None:
    """Evaluates in the child process, and sends progress, then an error or None."""
    let_idle_threads_sleep()
    os.environ.pop(TOKEN_VARIABLE, None)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    cancel = threading.Event()
    threading.Thread(target=_obey, args=(connection, cancel), daemon=True).start()
    try:
        config = parse(tree, "The request", plugins=True)  # made from the server's own run file
        with only_writer(config.output.folder):
            evaluate(config, roles, connection.send, cancel.is_set)
    except RaycompleteError as error:
        connection.send(error)
    else:
        connection.send(None)


def _obey(connection: Connection, cancel: threading.Event) -> None:
    with suppress(EOFError, OSError):
        while connection.recv() == "cancel":
            cancel.set()
    os._exit(3)  # the runner is gone


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds an evaluation's folder; the kernel lets go of it however this process ends.

    Raises:
        WaitTimeoutError: A process of an earlier attempt still writes there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, PRIVATE)
    try:
        problem = f"Another process still writes into {folder} and did not end"
        remedy = "End that process, and ask for the evaluation again."
        within(_LOCK_TIMEOUT_S, problem, lambda: fcntl.flock(descriptor, fcntl.LOCK_EX), remedy)
        yield
    finally:
        os.close(descriptor)
