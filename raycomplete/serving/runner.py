"""A worker of the queue, each evaluation in a process of its own, and the run folder that each evaluation leaves.

The process is a Ray driver on the same cluster. So an evaluation needs nothing that a replica lacks, its memory is
given back when it ends, and what kills it does not kill the service. It ends at once when its runner is gone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from raycomplete.config import RunConfig, parse
from raycomplete.runtime.errors import RaycompleteError, RefusedError, WorkError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.machine import let_idle_threads_sleep
from raycomplete.runtime.types import MODEL_ROLES, ModelRole
from raycomplete.serving.requests import TOKEN_VARIABLE, run_config
from raycomplete.serving.schemas import EvaluationRequest, SamplePage, SampleView, State
from raycomplete.serving.store import MAX_ATTEMPTS, Claimed, EvaluationStore, evaluation_folder, lock_of

_PROGRESS_EVERY_S = 0.2  # nobody reads more events than that
_POLL_S = 0.25  # between two looks at an empty queue, or for a cancellation
_CANCEL_GRACE_S = 10.0  # what a batch may take to end; finished trials are on disk already
_MAX_ERROR = 600  # characters
_HARMLESS = ("harmless", "capabilities")  # parts of an evaluation that attack nothing
_KEPT = "Finished trials are kept; submit it again if it is still wanted."
_SPAWN = multiprocessing.get_context("spawn")

OnProgress = Callable[[Mapping[str, Any]], None]
"""Takes `role`, `attack`, `variant`, `done`, `total`, `reused` and `outcomes`."""
Cancelled = Callable[[], bool]
"""Asked often; once it is true, the evaluation ends soon, in any way."""
Backend = Callable[[EvaluationRequest, Path, OnProgress, Cancelled], None]
"""Evaluates an admitted request in the folder of this evaluation alone, and leaves `summary.json` and `evaluation/`.

A call may follow one that was killed, and continues what that one left. After a `RefusedError` it is not tried again.
"""
Evaluate = Callable[[RunConfig, list[ModelRole], OnProgress, Cancelled], object]


class Runner:
    """One worker of the queue; the wait before the second attempt is doubled for each further one."""

    def __init__(self, store: EvaluationStore, backend: Backend, state: Path, *, retry_delay_s: float = 2.0) -> None:
        self._store, self._backend, self._state, self._retry_delay_s = store, backend, state, retry_delay_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ends the work at hand at its next batch and puts it back."""
        self._stopping.set()

    def run_forever(self) -> None:
        """Works until `stop`, also through a time in which the store cannot be read or written."""
        while not self._stopping.is_set():
            try:
                worked = self.run_one()
            except (sqlite3.Error, OSError):  # what it worked on is claimed again, and continues from what is on disk
                worked = False
            if not worked:
                self._stopping.wait(_POLL_S)

    def run_one(self) -> bool:
        """Runs the next evaluation; False where none waits."""
        claimed = self._store.claim()
        if claimed is None:
            return False
        evaluation, store = claimed.evaluation, self._store
        try:
            error = self._work(claimed)
            if error is None:
                store.finish(evaluation.id, State.SUCCEEDED)
            elif store.is_cancelling(evaluation.id):
                store.finish(evaluation.id, State.CANCELLED)
            elif self._stopping.is_set():
                store.put_back(evaluation.id)
            elif isinstance(error, RefusedError) or evaluation.attempts >= MAX_ATTEMPTS:
                store.finish(evaluation.id, State.FAILED, one_sentence(error))
            else:
                delay_s = self._retry_delay_s * 2 ** (evaluation.attempts - 1)
                store.put_back(evaluation.id, error=one_sentence(error), delay_s=delay_s)
        finally:
            claimed.release()
        return True

    def _work(self, claimed: Claimed) -> Exception | None:
        identity = claimed.evaluation.id

        def tell(progress: Mapping[str, Any]) -> None:
            with suppress(sqlite3.Error):  # work must not end for want of an event
                self._store.progress(identity, progress)

        def cancelled() -> bool:
            with suppress(sqlite3.Error):
                return self._stopping.is_set() or self._store.is_cancelling(identity)
            return False

        follower = Follower(tell)
        try:
            request = EvaluationRequest.model_validate(claimed.evaluation.request)
            self._backend(request, evaluation_folder(self._state, identity), follower, cancelled)
        except Exception as error:
            return error
        finally:
            follower.flush()
        return None


class Follower:
    """Passes progress on, but not more often than anyone reads it; the last word on each attack is never dropped."""

    def __init__(self, tell: OnProgress) -> None:
        self._tell, self._told = tell, 0.0
        self._held: Mapping[str, Any] | None = None

    def __call__(self, progress: Mapping[str, Any]) -> None:
        if self._held is not None and any(self._held.get(name) != progress.get(name) for name in ("role", "attack")):
            self.flush()
        self._held = progress
        if time.monotonic() - self._told >= _PROGRESS_EVERY_S:
            self.flush()
            self._told = time.monotonic()

    def flush(self) -> None:
        if self._held is not None:
            self._tell(self._held)
            self._held = None


class ProcessBackend:
    """Evaluates in a process of its own (a `Backend`) on the cluster of the replica that makes it.

    `evaluate` is called in that process, so it must be a function of a module.
    """

    def __init__(self, config: RunConfig, evaluate: Evaluate) -> None:
        cluster = config.cluster.model_copy(update={"address": ray.get_runtime_context().gcs_address})
        self._config, self._evaluate = config.model_copy(update={"cluster": cluster}), evaluate

    def __call__(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        tree = run_config(self._config, request, folder).model_dump(mode="json")
        log = folder.with_name(f"{folder.name}.log")
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_evaluate, args=(theirs, self._evaluate, tree, request.roles, log))
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
        if connection.poll(_POLL_S):
            try:
                message = connection.recv()
            except OSError as error:  # torn where it was killed
                raise EOFError from error
            if message is None:
                return
            if isinstance(message, Exception):
                raise message
            on_progress(message)
        if give_up_at == float("inf") and cancelled():
            give_up_at = time.monotonic() + _CANCEL_GRACE_S
            with suppress(BrokenPipeError):  # it has ended, and what it said last tells why
                connection.send("cancel")
        if time.monotonic() > give_up_at:
            raise WorkError("The evaluation was stopped in the middle of a batch.", _KEPT)


def _evaluate(connection: Connection, evaluate: Evaluate, tree: Any, roles: list[ModelRole], log: Path) -> None:
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
        lock = lock_of(config.output.folder)  # with its runner, so that the next one waits for the end of both
        evaluate(config, roles, connection.send, cancel.is_set)
        if lock is not None:
            lock.close()
    except RaycompleteError as error:
        connection.send(error)
    else:
        connection.send(None)


def _obey(connection: Connection, cancel: threading.Event) -> None:
    with suppress(EOFError, OSError):
        while connection.recv() == "cancel":
            cancel.set()
    os._exit(3)  # the runner is gone


def one_sentence(error: BaseException) -> str:
    """Puts an error into words for people; without tracebacks, and short enough for a table."""
    if isinstance(error, RaycompleteError):
        text = str(error)
    else:
        lines = str(error).strip().splitlines()
        text = f"The evaluation failed ({type(error).__name__}{': ' + lines[0] if lines else ''})."
    text = " ".join(text.split()).encode("utf-8", errors="backslashreplace").decode()
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 3] + "..."


def read_samples(
    folder: Path, wanted: Mapping[str, str | None], *, offset: int, limit: int, show_harmful: bool
) -> SamplePage:
    """Reads responses that an evaluation kept, those of the wanted role, attack and outcome.

    Without `show_harmful`, the text of responses to attacks is withheld.
    """
    kept = folder / "evaluation" / "completions"
    chosen = {name: value for name, value in wanted.items() if value is not None}.items()
    found, total = [], 0
    for total, row in enumerate((row for row in _rows(kept) if chosen <= row.items()), 1):
        if offset < total <= offset + limit:
            found.append(_sample(row, show_harmful=show_harmful))
    return SamplePage(items=found, total=total, saved=kept.is_dir())


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for role in MODEL_ROLES:
        file = folder / f"{role}.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from (json.loads(line) for line in lines if line.strip())


def _sample(row: dict[str, Any], *, show_harmful: bool) -> SampleView:
    row = {"attack": "", "seed": 0, "outcome": None} | row
    row["harmful"] = row["attack"] not in _HARMLESS
    for name in ("prefill", "continuation"):
        # A byte-level tokenizer may decode half a character to a lone surrogate, which UTF-8 cannot carry.
        text = str(row.get(name, "")).encode(errors="replace").decode()
        row[name] = text if show_harmful or not row["harmful"] else None
    return SampleView.model_validate(row)
