"""Works through the queue: claims an evaluation, keeps its lease, tells how far it is, and stores how it ended."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.serving.backend import EvaluationBackend
from raycomplete.serving.schemas import EvaluationRequest
from raycomplete.serving.store import EvaluationStore
from raycomplete.serving.tables import Claimed, State

_PROGRESS_EVERY_S = 0.2  # more events than that nobody reads
_CANCEL_WITHIN_S = 2.0  # longest time before the work hears of a cancellation
_MAX_ERROR = 600  # characters


def evaluation_folder(state: Path, identity: str) -> Path:
    """The run folder of an evaluation."""
    return state / "evaluations" / identity


def one_sentence(error: BaseException) -> str:
    """An error for people; without tracebacks, and short enough for a table."""
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
        backend: Does the work.
        state: Folder under which each evaluation gets a run folder.
        lease_s: Silence after which another runner takes over.
        max_attempts: Starts of one evaluation before it counts as failed.
        retry_delay_s: Wait before the second attempt; doubled for each further one.
        idle_s: Wait between two looks at an empty queue.
    """

    def __init__(
        self,
        store: EvaluationStore,
        backend: EvaluationBackend,
        state: Path,
        *,
        lease_s: float,
        max_attempts: int,
        retry_delay_s: float = 2.0,
        idle_s: float = 0.25,
    ) -> None:
        self._store = store
        self._backend = backend
        self._state = state
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._retry_delay_s = retry_delay_s
        self._idle_s = idle_s
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
                self._stopping.wait(self._idle_s)

    def run_one(self) -> bool:
        """Runs the next evaluation; False where none waits."""
        claimed = self._store.claim(lease_s=self._lease_s, max_attempts=self._max_attempts)
        if claimed is None:
            return False
        with self._lease(claimed) as lease:
            error = self._work(claimed, lease)
        self._close(claimed, lease, error)
        return True

    def _work(self, claimed: Claimed, lease: _Lease) -> Exception | None:
        follow = _Follower(lambda progress: self._tell(claimed, lease, progress))
        try:
            request = EvaluationRequest.model_validate(claimed.evaluation.request)
            folder = evaluation_folder(self._state, claimed.evaluation.id)
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._backend.run(request, folder, follow, lambda: lease.lost or lease.cancel or self._stopping.is_set())
        except Exception as error:
            return error
        finally:
            follow.flush()
        return None

    def _tell(self, claimed: Claimed, lease: _Lease, progress: Mapping[str, Any]) -> None:
        with suppress(sqlite3.Error):  # work must not end for want of an event
            lease.lost = lease.lost or not self._store.progress(claimed, progress)

    def _close(self, claimed: Claimed, lease: _Lease, error: Exception | None) -> None:
        """Stores how it ended. Every write below is void if the claim was lost."""
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

    @contextmanager
    def _lease(self, claimed: Claimed) -> Iterator[_Lease]:
        """Renews the claim from a thread of its own, since the work may say nothing for minutes."""
        lease = _Lease()
        ends_at = time.monotonic() + self._lease_s

        def keep() -> None:
            nonlocal ends_at
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
                lease.cancel, ends_at = found.cancel, asked_at + self._lease_s

        thread = threading.Thread(target=keep, name=f"lease-{claimed.evaluation.id}", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            lease.done.set()
            thread.join()


@dataclass
class _Lease:
    """What the renewing thread learned."""

    lost: bool = False
    cancel: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class _Follower:
    """Passes progress on, but not more often than anyone reads it; the last word on each attack is never dropped."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], Any]) -> None:
        self._tell = tell
        self._held: Mapping[str, Any] | None = None
        self._told = 0.0

    def __call__(self, progress: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self._held is not None and self._part(self._held) != self._part(progress):
            self.flush()
        if now - self._told >= _PROGRESS_EVERY_S:
            self._tell(progress)
            self._told, self._held = now, None
        else:
            self._held = progress

    def flush(self) -> None:
        if self._held is not None:
            self._tell(self._held)
            self._held = None

    @staticmethod
    def _part(progress: Mapping[str, Any]) -> tuple[Any, Any]:
        return progress.get("role"), progress.get("attack")
