"""The queue of evaluations and its events, in one SQLite file that every replica of this machine opens.

A runner holds the lock of the evaluation that it works on, and so does the evaluation's process. The kernel releases
the lock when they end, however they end; then the next runner takes the evaluation over.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from raycomplete.runtime.errors import RefusedError, SetupError
from raycomplete.runtime.files import PRIVATE
from raycomplete.serving.schemas import EvaluationPage, EvaluationView, State

FORMAT = 1  # raise it when a table changes its meaning
SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    label TEXT NOT NULL,
    request TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    state TEXT NOT NULL,
    cancel INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    progress TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL,
    started REAL,
    finished REAL
);
CREATE INDEX IF NOT EXISTS evaluations_by_state ON evaluations (state, number);
CREATE TABLE IF NOT EXISTS events (
    evaluation TEXT NOT NULL,
    seq INTEGER NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (evaluation, seq)
) WITHOUT ROWID;
"""
_BUSY_S = 30.0  # longest wait for another process's write
MAX_ATTEMPTS = 3  # starts of one evaluation before it counts as failed
_CLAIMABLE = """
SELECT id, cancel, attempts, started, error FROM evaluations
WHERE (state = 'queued' AND not_before <= ?) OR state = 'running' ORDER BY number LIMIT 200
"""
_TOTALS = """
SELECT coalesce(sum(attempts), 0) AS attempts, coalesce(sum(finished - started), 0) AS seconds,
coalesce(max(CASE WHEN state = 'queued' THEN ? - created END), 0) AS oldest FROM evaluations
"""


class QueueFullError(RefusedError):
    """No further evaluation may wait."""


class KeyReusedError(RefusedError):
    """An idempotency key came back with another request."""


class Claimed(NamedTuple):
    """An evaluation that a runner works on, and its lock; `release` gives it up."""

    evaluation: EvaluationView
    lock: IO[str]

    def release(self) -> None:
        self.lock.close()


class Event(NamedTuple):
    """Something that happened to an evaluation; `seq` counts from 1 without gaps."""

    seq: int
    time: float
    kind: str
    data: dict[str, Any]


def evaluation_folder(state: Path, identity: str) -> Path:
    """Returns the run folder of an evaluation."""
    return state / "evaluations" / identity


def lock_of(folder: Path, kind: int = fcntl.LOCK_SH) -> IO[str] | None:
    """Locks an evaluation's folder for as long as the returned file is open; None where another process prevents it.

    The lock lies beside the folder, which the pipeline wants empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.fdopen(os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, PRIVATE), "r+")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


class EvaluationStore:
    """The queue. `folder` must be on a local disk: SQLite's write-ahead log needs memory that the processes share."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "evaluations.sqlite"
        self._folder, self._clock, self._lock = folder, clock, threading.RLock()
        path.touch(PRIVATE)
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # what was answered with 202 outlives a power cut
        with self._writing() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                problem = f"{path} has format {version}, and this version of raycomplete reads {FORMAT}."
                raise SetupError(problem, "Choose another serve.state.")
            for statement in SCHEMA.split(";"):  # executescript would commit at once
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Lets go of the database."""
        with self._lock:
            self._connection.close()

    def submit(
        self, request: Mapping[str, Any], *, label: str, key: str | None, max_queued: int
    ) -> tuple[EvaluationView, bool]:
        """Adds an evaluation, or finds the one that the same key added before; True where it is new."""
        text, identity = _canonical(request), secrets.token_hex(8)
        with self._writing() as connection:
            row = connection.execute("SELECT * FROM evaluations WHERE idempotency_key = ?", (key,)).fetchone()
            if row is not None:
                if row["request"] == text:
                    return _view(row), False
                raise KeyReusedError("This Idempotency-Key was used for another request.", "Use a new key.")
            waiting = self.counts()[State.QUEUED]
            if waiting >= max_queued:
                raise QueueFullError(f"{waiting} evaluations are waiting already.", "Try again later.")
            columns = "id, label, request, idempotency_key, state, created"
            values = (identity, label, text, key, State.QUEUED, self._clock())
            connection.execute(f"INSERT INTO evaluations ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
            self._tell(identity, "queued", {})
            return self._one(identity), True

    def get(self, identity: str) -> EvaluationView | None:
        """Returns an evaluation; None where there is none."""
        with self._lock:
            row = self._row(identity)
        return None if row is None else _view(row)

    def page(
        self, *, limit: int, before: int | None = None, state: State | None = None, label: str | None = None
    ) -> EvaluationPage:
        """Lists evaluations of a state and a label, newest first; `before` is the `next` of the page before."""
        conditions = {"state = ?": state, "label = ?": label}
        chosen = {condition: value for condition, value in conditions.items() if value is not None}
        where, values = " AND ".join(chosen) or "1", tuple(chosen.values())
        with self._transaction("BEGIN") as connection:  # so that both queries see the same rows
            total = connection.execute(f"SELECT count(*) FROM evaluations WHERE {where}", values).fetchone()[0]
            rows = connection.execute(
                f"SELECT * FROM evaluations WHERE {where} AND number < ? ORDER BY number DESC LIMIT ?",
                (*values, 2**62 if before is None else before, limit),
            ).fetchall()
        following = rows[-1]["number"] if len(rows) == limit and rows[-1]["number"] > 1 else None
        return EvaluationPage(items=[_view(row) for row in rows], total=total, next=following)

    def events(self, identity: str, *, after: int = 0) -> list[Event]:
        """Lists what happened after the event with that number, in order, at most 500."""
        query = "SELECT * FROM events WHERE evaluation = ? AND seq > ? ORDER BY seq LIMIT 500"
        with self._lock:
            rows = self._connection.execute(query, (identity, after)).fetchall()
        return [Event(row["seq"], row["time"], row["kind"], json.loads(row["data"])) for row in rows]

    def cancel(self, identity: str) -> EvaluationView | None:
        """Ends a waiting evaluation at once and a running one at its next batch; None where there is none."""
        with self._writing():
            row = self._row(identity)
            if row is None:
                return None
            if row["state"] == State.QUEUED:
                self._end(identity, State.CANCELLED)
            elif row["state"] == State.RUNNING and not row["cancel"]:
                self._set(identity, cancel=1)
                self._tell(identity, "cancelling", {})
            return self._one(identity)

    def claim(self) -> Claimed | None:
        """Claims the oldest evaluation that waits or whose runner has ended; None where there is none."""
        now = self._clock()
        with self._lock:  # an idle runner must not keep writers waiting
            if self._connection.execute(_CLAIMABLE, (now,)).fetchone() is None:
                return None
        with self._writing() as connection:
            for row in connection.execute(_CLAIMABLE, (now,)).fetchall():
                identity, attempts = row["id"], row["attempts"]
                lock = lock_of(evaluation_folder(self._folder, identity), fcntl.LOCK_EX)
                if lock is None:
                    continue
                if row["cancel"]:
                    self._end(identity, State.CANCELLED)
                elif attempts >= MAX_ATTEMPTS:
                    self._end(identity, State.FAILED, _lost(identity, row["error"]))
                else:
                    fcntl.flock(lock, fcntl.LOCK_SH)  # the evaluation's process shares it
                    started = now if row["started"] is None else row["started"]
                    self._set(identity, state=State.RUNNING, started=started, attempts=attempts + 1)
                    self._tell(identity, "started", {"attempt": attempts + 1})
                    return Claimed(self._one(identity), lock)
                lock.close()
        return None

    def is_cancelling(self, identity: str) -> bool:
        """Tells whether a running evaluation should end."""
        with self._lock:
            return bool(self._row(identity)["cancel"])

    def progress(self, identity: str, progress: Mapping[str, Any]) -> None:
        """Stores how far one model is."""
        with self._writing():
            newest = self._one(identity).progress | {str(progress["role"]): dict(progress)}
            self._set(identity, progress=_canonical(newest))
            self._tell(identity, "progress", progress)

    def finish(self, identity: str, state: State, error: str | None = None) -> None:
        """Ends an evaluation."""
        with self._writing():
            self._end(identity, state, error)

    def put_back(self, identity: str, *, error: str | None = None, delay_s: float = 0.0) -> None:
        """Lets another attempt follow: after a failure (`error`), or because the runner is being stopped."""
        with self._writing():
            attempts = self._one(identity).attempts - (error is None)  # a stopped runner is no failure
            self._set(identity, state=State.QUEUED, not_before=self._clock() + delay_s, attempts=attempts, error=error)
            self._tell(identity, "waiting", {"error": error})

    def counts(self) -> dict[State, int]:
        """Counts the evaluations in each state."""
        with self._lock:
            rows = self._connection.execute("SELECT state, count(*) FROM evaluations GROUP BY state").fetchall()
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def totals(self) -> dict[str, float]:
        """Sums over all evaluations: attempts, seconds from start to end, and age of the oldest that waits."""
        with self._lock:
            return dict(self._connection.execute(_TOTALS, (self._clock(),)).fetchone())

    def _row(self, identity: str) -> Any:
        return self._connection.execute("SELECT * FROM evaluations WHERE id = ?", (identity,)).fetchone()

    def _one(self, identity: str) -> EvaluationView:
        return _view(self._row(identity))

    def _set(self, identity: str, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        self._connection.execute(f"UPDATE evaluations SET {columns} WHERE id = ?", (*values.values(), identity))

    def _end(self, identity: str, state: State, error: str | None = None) -> None:
        self._set(identity, state=state, error=error, finished=self._clock())
        self._tell(identity, str(state), {"error": error})

    def _tell(self, identity: str, kind: str, data: Mapping[str, Any]) -> None:
        self._connection.execute(
            "INSERT INTO events (evaluation, seq, time, kind, data) "
            "SELECT ?, coalesce(max(seq), 0) + 1, ?, ?, ? FROM events WHERE evaluation = ?",
            (identity, self._clock(), kind, _canonical(data), identity),
        )

    def _writing(self) -> Any:
        """Opens a transaction that holds the write lock from its start: what it reads cannot change under it."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute(begin)
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def _lost(identity: str, error: str | None) -> str:
    """Says why an evaluation is not started again whose runner ended in the last attempt."""
    earlier = f" An earlier attempt failed: {error}" if error else ""
    return (
        f"The evaluation's runner was lost in the last of {MAX_ATTEMPTS} attempts, most likely out of memory.{earlier} "
        f"Free memory or ask for less, and submit it again; evaluations/{identity}.log says more."
    )


def _view(row: sqlite3.Row) -> EvaluationView:
    values = {name: row[name] for name in row.keys() if name in EvaluationView.model_fields}  # noqa: SIM118
    values |= {name: json.loads(row[name]) for name in ("request", "progress")}
    return EvaluationView(**values, cancelling=bool(row["cancel"]) and not State(row["state"]).final)


def _canonical(content: Mapping[str, Any]) -> str:
    """Writes JSON whose equality is equality of content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
