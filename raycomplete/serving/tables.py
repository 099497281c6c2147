"""Tables of the evaluation store and the rows that leave it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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
    claim TEXT,
    lease_until REAL NOT NULL DEFAULT 0,
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


class State(StrEnum):
    """Where an evaluation is. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One row of the queue.

    Attributes:
        number: Place in the order of submission.
        request: What was asked for, as admitted.
        attempts: How often it was started.
        cancel: Someone asked to stop it.
        progress: The newest progress of each model, by role.
        created: Seconds since the epoch, as `started` and `finished`.
    """

    number: int
    id: str
    label: str
    request: dict[str, Any]
    state: State
    cancel: bool
    attempts: int
    error: str | None
    progress: dict[str, Any]
    created: float
    started: float | None
    finished: float | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """An evaluation that a runner holds: whatever it writes must name the claim, which dies with the lease."""

    evaluation: Evaluation
    claim: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an evaluation; `seq` counts from 1 without gaps."""

    seq: int
    time: float
    kind: str
    data: dict[str, Any]


def evaluation_of(row: sqlite3.Row) -> Evaluation:
    return Evaluation(
        number=row["number"],
        id=row["id"],
        label=row["label"],
        request=json.loads(row["request"]),
        state=State(row["state"]),
        cancel=bool(row["cancel"]),
        attempts=row["attempts"],
        error=row["error"],
        progress=json.loads(row["progress"]),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
    )


def canonical(content: Mapping[str, Any]) -> str:
    """JSON whose equality is equality of content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
