"""A worker of the queue, and the run folder that each evaluation leaves.

The worker claims an evaluation, keeps its lease, stores how far it is, and stores how it ended.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving.schemas import EvaluationRequest, SamplePage, SampleView, State
from raycomplete.serving.store import Claimed, EvaluationStore

_PROGRESS_EVERY_S = 0.2  # more events than that nobody reads
_IDLE_S = 0.25  # between two looks at an empty queue
_CANCEL_WITHIN_S = 2.0  # longest time before the work hears of a cancellation
_MAX_ERROR = 600  # characters
_HARMLESS = ("harmless", "capabilities")  # parts of an evaluation that attack nothing

OnProgress = Callable[[Mapping[str, Any]], None]
"""Takes `role`, `attack`, `variant`, `done`, `total`, `reused` and `outcomes`."""
Cancelled = Callable[[], bool]
"""Asked often; once it is true, the evaluation ends soon, in any way."""
Backend = Callable[[EvaluationRequest, Path, OnProgress, Cancelled], None]
"""Evaluates an admitted request in the folder of this evaluation alone, and leaves `summary.json` and `evaluation/`.

One call works at a time, but a call may follow one that was killed, and continues what that one left. `RefusedError`:
it cannot be done, now or later. Any other error: another attempt may succeed.
"""


def evaluation_folder(state: Path, identity: str) -> Path:
    """Returns the run folder of an evaluation."""
    return state / "evaluations" / identity


def read_results(folder: Path) -> dict[str, Any] | None:
    """Reads `summary.json` of a run folder."""
    return read_json(folder / "summary.json")


def read_samples(folder: Path, *, offset: int, limit: int, show_harmful: bool, **wanted: str | None) -> SamplePage:
    """Reads responses that an evaluation kept.

    Args:
        folder: Run folder.
        offset: Samples to skip.
        limit: At most so many.
        show_harmful: Give the text of responses to attacks; without it only what they were judged.
        wanted: Only those of this `role`, `attack` or `outcome`.
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


def one_sentence(error: BaseException) -> str:
    """Puts an error into words for people; without tracebacks, and short enough for a table."""
    if isinstance(error, RaycompleteError):
        text = str(error)
    else:
        lines = str(error).strip().splitlines()
        text = f"The evaluation failed ({type(error).__name__}{': ' + lines[0] if lines else ''})."
    text = " ".join(text.split()).encode("utf-8", errors="backslashreplace").decode()
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 3] + "..."


class Runner:
    """One worker of the queue.

    Args:
        store: The queue.
        backend: Evaluates.
        state: Folder under which each evaluation gets a run folder.
        lease_s: Silence after which another runner takes over.
        max_attempts: Starts of one evaluation before it counts as failed.
        retry_delay_s: Wait before the second attempt; doubled for each further one.
    """

    def __init__(
        self,
        store: EvaluationStore,
        backend: Backend,
        state: Path,
        *,
        lease_s: float,
        max_attempts: int,
        retry_delay_s: float = 2.0,
    ) -> None:
        self._store, self._backend, self._state = store, backend, state
        self._lease_s, self._max_attempts, self._retry_delay_s = lease_s, max_attempts, retry_delay_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ends the work at hand at its next batch and puts it back."""
        self._stopping.set()

    def run_forever(self) -> None:
        """Works until `stop`, or again once a store that cannot be read or written for a while is back."""
        while not self._stopping.is_set():
            try:
                worked = self.run_one()
            except sqlite3.Error:
                worked = False
            if not worked:
                self._stopping.wait(_IDLE_S)

    def run_one(self) -> bool:
        """Runs the next evaluation; False where none waits."""
        claimed = self._store.claim(lease_s=self._lease_s, max_attempts=self._max_attempts)
        if claimed is None:
            return False
        lease = _Lease()
        # Renewed from a thread of its own, since the work may say nothing for minutes.
        keeper = threading.Thread(target=self._keep, args=(claimed, lease), daemon=True)
        keeper.start()
        try:
            error = self._work(claimed, lease)
        finally:
            lease.done.set()
            keeper.join()
        # Every write below is void if the claim was lost.
        if error is None:
            self._store.finish(claimed, State.SUCCEEDED)
        elif lease.cancel:
            self._store.finish(claimed, State.CANCELLED)
        elif self._stopping.is_set():
            self._store.put_back(claimed)
        elif isinstance(error, RefusedError) or claimed.evaluation.attempts >= self._max_attempts:
            self._store.finish(claimed, State.FAILED, one_sentence(error))
        else:
            delay_s = self._retry_delay_s * 2 ** (claimed.evaluation.attempts - 1)
            self._store.put_back(claimed, error=one_sentence(error), delay_s=delay_s)
        return True

    def _work(self, claimed: Claimed, lease: _Lease) -> Exception | None:
        def tell(progress: Mapping[str, Any]) -> None:
            with suppress(sqlite3.Error):  # work must not end for want of an event
                lease.lost = lease.lost or not self._store.progress(claimed, progress)

        follow = _Follower(tell)
        try:
            request = EvaluationRequest.model_validate(claimed.evaluation.request)
            folder = evaluation_folder(self._state, claimed.evaluation.id)
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._backend(request, folder, follow, lambda: lease.lost or lease.cancel or self._stopping.is_set())
        except Exception as error:
            return error
        finally:
            follow.flush()
        return None

    def _keep(self, claimed: Claimed, lease: _Lease) -> None:
        """Renews a claim until its work is done or it is lost."""
        ends_at = time.monotonic() + self._lease_s
        while not lease.done.wait(min(self._lease_s / 4, _CANCEL_WITHIN_S)):
            asked_at = time.monotonic()
            try:
                found = self._store.renew(claimed, lease_s=self._lease_s)
            except sqlite3.Error:  # locked or the disk is full: it may pass while the lease holds
                if time.monotonic() < ends_at:
                    continue
                found = None
            if found is None:
                lease.lost = True
                return
            lease.cancel, ends_at = found.cancelling, asked_at + self._lease_s


@dataclass
class _Lease:
    """A claim, as the thread that renews it last saw it."""

    lost: bool = False
    cancel: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class _Follower:
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
