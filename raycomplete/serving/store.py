"""The queue of evaluations and what happened to each, in one SQLite file that every replica of this machine opens.

Runners claim evaluations under a lease. Whoever stops renewing it (killed, frozen, cut off) loses the evaluation to the
next runner, and its late writes are refused, since they name a claim that is no longer the current one.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import RefusedError, SetupError
from raycomplete.runtime.files import PRIVATE
from raycomplete.serving.tables import (
    FORMAT,
    SCHEMA,
    Claimed,
    Evaluation,
    Event,
    State,
    canonical,
    evaluation_of,
)

_BUSY_S = 30.0  # longest wait for another process's write
_CLAIMABLE = (
    "SELECT id, cancel, attempts FROM evaluations WHERE (state = ? AND not_before <= ?) "
    "OR (state = ? AND lease_until <= ?) ORDER BY number LIMIT 20"
)


class QueueFullError(RefusedError):
    """As many evaluations wait as may wait."""


class KeyReusedError(RefusedError):
    """An idempotency key came back with another request."""


class EvaluationStore:
    """The queue.

    Args:
        folder: On a local disk: SQLite's write-ahead log needs memory that the processes share.
        clock: Seconds since the epoch, for tests.

    Raises:
        SetupError: The file was made by another version.
    """

    def __init__(self, folder: Path, clock: Any = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / "evaluations.sqlite"
        self._clock = clock
        self._lock = threading.RLock()
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, PRIVATE))
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # what was answered with 202 outlives a power cut
        with self._writing() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise SetupError(
                    f"{self._path} has format {version}, and this version of raycomplete reads {FORMAT}.",
                    "Choose another serve.state.",
                )
            for statement in SCHEMA.split(";"):  # executescript would commit at once
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Lets go of the database."""
        with self._lock:
            self._connection.close()

    def submit(
        self, request: Mapping[str, Any], *, label: str, key: str | None, max_queued: int
    ) -> tuple[Evaluation, bool]:
        """Adds an evaluation, or finds the one that the same key added before.

        Returns:
            The evaluation, and whether it is new.

        Raises:
            QueueFullError: `max_queued` evaluations wait already.
            KeyReusedError: The key belongs to another request.
        """
        text = canonical(request)
        with self._writing() as connection:
            if key is not None:
                row = connection.execute("SELECT * FROM evaluations WHERE idempotency_key = ?", (key,)).fetchone()
                if row is not None:
                    if row["request"] != text:
                        raise KeyReusedError(
                            "This Idempotency-Key was used for another request.", "Use a new key for each evaluation."
                        )
                    return evaluation_of(row), False
            waiting = connection.execute(
                "SELECT count(*) FROM evaluations WHERE state = ?", (State.QUEUED,)
            ).fetchone()[0]
            if waiting >= max_queued:
                raise QueueFullError(f"{waiting} evaluations are waiting already.", "Try again later.")
            now, identity = self._clock(), secrets.token_hex(8)
            connection.execute(
                "INSERT INTO evaluations (id, label, request, idempotency_key, state, created) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (identity, label, text, key, State.QUEUED, now),
            )
            self._tell(connection, identity, "queued", {})
            return self._one(connection, identity), True

    def get(self, identity: str) -> Evaluation | None:
        with self._lock:
            row = self._connection.execute("SELECT * FROM evaluations WHERE id = ?", (identity,)).fetchone()
        return None if row is None else evaluation_of(row)

    def page(
        self, *, limit: int, before: int | None = None, state: State | None = None, label: str | None = None
    ) -> tuple[list[Evaluation], int]:
        """Evaluations, newest first, and how many match in all.

        Args:
            limit: At most so many.
            before: Only those submitted before the one with this number.
            state: Only those in this state.
            label: Only those with this label.
        """
        conditions = {"state = ?": state, "label = ?": label}
        chosen = {condition: value for condition, value in conditions.items() if value is not None}
        where = " AND ".join(chosen) or "1"
        with self._reading() as connection:
            total = connection.execute(
                f"SELECT count(*) FROM evaluations WHERE {where}", tuple(chosen.values())
            ).fetchone()[0]
            rows = connection.execute(
                f"SELECT * FROM evaluations WHERE {where} AND number < ? ORDER BY number DESC LIMIT ?",
                (*chosen.values(), 2**62 if before is None else before, limit),
            ).fetchall()
        return [evaluation_of(row) for row in rows], total

    def events(self, identity: str, *, after: int = 0, limit: int = 500) -> list[Event]:
        """What happened after the event with that number, in order."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT * FROM events WHERE evaluation = ? AND seq > ? ORDER BY seq LIMIT ?", (identity, after, limit)
            ).fetchall()
        return [Event(row["seq"], row["time"], row["kind"], json.loads(row["data"])) for row in rows]

    def cancel(self, identity: str) -> Evaluation | None:
        """Ends a waiting evaluation at once and a running one at its next batch; None where there is none."""
        with self._writing() as connection:
            row = connection.execute("SELECT * FROM evaluations WHERE id = ?", (identity,)).fetchone()
            if row is None:
                return None
            if row["state"] == State.QUEUED:
                self._end(connection, identity, State.CANCELLED, None)
            elif row["state"] == State.RUNNING and not row["cancel"]:
                connection.execute("UPDATE evaluations SET cancel = 1 WHERE id = ?", (identity,))
                self._tell(connection, identity, "cancelling", {})
            return self._one(connection, identity)

    def claim(self, *, lease_s: float, max_attempts: int) -> Claimed | None:
        """The oldest evaluation that waits or whose runner fell silent; None where there is none."""
        with self._lock:  # most asks find nothing, and must not keep writers waiting
            if self._connection.execute(_CLAIMABLE, self._claimable()).fetchone() is None:
                return None
        with self._writing() as connection:
            for row in connection.execute(_CLAIMABLE, self._claimable()).fetchall():
                if row["cancel"]:
                    self._end(connection, row["id"], State.CANCELLED, None)
                elif row["attempts"] >= max_attempts:
                    problem = f"The evaluation's runner was lost {row['attempts']} times, most likely out of memory."
                    self._end(connection, row["id"], State.FAILED, problem)
                else:
                    now, claim = self._clock(), secrets.token_hex(8)
                    connection.execute(
                        "UPDATE evaluations SET state = ?, claim = ?, lease_until = ?, attempts = attempts + 1, "
                        "started = coalesce(started, ?) WHERE id = ?",
                        (State.RUNNING, claim, now + lease_s, now, row["id"]),
                    )
                    self._tell(connection, row["id"], "started", {"attempt": row["attempts"] + 1})
                    return Claimed(self._one(connection, row["id"]), claim)
        return None

    def renew(self, claimed: Claimed, *, lease_s: float) -> Evaluation | None:
        """Keeps a claim for another lease; None where it was lost."""
        with self._holding(claimed) as connection:
            if connection is None:
                return None
            connection.execute(
                "UPDATE evaluations SET lease_until = ? WHERE id = ?", (self._clock() + lease_s, claimed.evaluation.id)
            )
            return self._one(connection, claimed.evaluation.id)

    def progress(self, claimed: Claimed, progress: Mapping[str, Any]) -> bool:
        """Stores how far one model is; False where the claim was lost."""
        with self._holding(claimed) as connection:
            if connection is None:
                return False
            newest = self._one(connection, claimed.evaluation.id).progress | {str(progress["role"]): dict(progress)}
            connection.execute(
                "UPDATE evaluations SET progress = ? WHERE id = ?", (canonical(newest), claimed.evaluation.id)
            )
            self._tell(connection, claimed.evaluation.id, "progress", progress)
            return True

    def finish(self, claimed: Claimed, state: State, error: str | None = None) -> bool:
        """Ends an evaluation; False where the claim was lost."""
        with self._holding(claimed) as connection:
            if connection is None:
                return False
            self._end(connection, claimed.evaluation.id, state, error)
            return True

    def put_back(self, claimed: Claimed, *, error: str | None = None, delay_s: float = 0.0) -> bool:
        """Lets another attempt follow: after a failure (`error`), or without one because the runner is being stopped.

        Returns:
            False where the claim was lost.
        """
        with self._holding(claimed) as connection:
            if connection is None:
                return False
            counted = 0 if error is None else 1  # a stopped runner is no failure of the evaluation
            connection.execute(
                "UPDATE evaluations SET state = ?, claim = NULL, not_before = ?, attempts = attempts - ?, error = ? "
                "WHERE id = ?",
                (State.QUEUED, self._clock() + delay_s, 1 - counted, error, claimed.evaluation.id),
            )
            self._tell(connection, claimed.evaluation.id, "waiting", {"error": error})
            return True

    def counts(self) -> dict[State, int]:
        """How many evaluations are in each state."""
        with self._lock:
            rows = self._connection.execute("SELECT state, count(*) FROM evaluations GROUP BY state").fetchall()
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def totals(self) -> dict[str, float]:
        """Sums over all evaluations: attempts, seconds from start to end, and age of the oldest that waits."""
        with self._lock:
            row = self._connection.execute(
                "SELECT coalesce(sum(attempts), 0) AS attempts, coalesce(sum(finished - started), 0) AS seconds, "
                "coalesce(max(CASE WHEN state = 'queued' THEN ? - created END), 0) AS oldest FROM evaluations",
                (self._clock(),),
            ).fetchone()
        return dict(row)

    def _claimable(self) -> tuple[Any, ...]:
        now = self._clock()
        return State.QUEUED, now, State.RUNNING, now

    def _one(self, connection: sqlite3.Connection, identity: str) -> Evaluation:
        return evaluation_of(connection.execute("SELECT * FROM evaluations WHERE id = ?", (identity,)).fetchone())

    def _end(self, connection: sqlite3.Connection, identity: str, state: State, error: str | None) -> None:
        connection.execute(
            "UPDATE evaluations SET state = ?, error = ?, claim = NULL, finished = ? WHERE id = ?",
            (state, error, self._clock(), identity),
        )
        self._tell(connection, identity, str(state), {"error": error})

    def _tell(self, connection: sqlite3.Connection, identity: str, kind: str, data: Mapping[str, Any]) -> None:
        connection.execute(
            "INSERT INTO events (evaluation, seq, time, kind, data) "
            "SELECT ?, coalesce(max(seq), 0) + 1, ?, ?, ? FROM events WHERE evaluation = ?",
            (identity, self._clock(), kind, canonical(data), identity),
        )

    @contextmanager
    def _holding(self, claimed: Claimed) -> Iterator[sqlite3.Connection | None]:
        """A transaction in which the claim is valid, or None. A late renewal is good as long as no one else came."""
        with self._writing() as connection:
            row = connection.execute(
                "SELECT 1 FROM evaluations WHERE id = ? AND claim = ? AND state = ?",
                (claimed.evaluation.id, claimed.claim, State.RUNNING),
            ).fetchone()
            yield connection if row is not None else None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction, so that two queries see the same rows."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("COMMIT")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start: what it reads cannot change under it."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
