"""A worker of the queue, and the run folder that each evaluation leaves.

The worker claims an evaluation, keeps its lease, stores how far it is, and stores how it ended.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving.schemas import EvaluationRequest, SamplePage, SampleView, State
from raycomplete.serving.store import Claimed, EvaluationStore

_PROGRESS_EVERY_S = 0.2  # more events than that nobody reads
_CANCEL_WITHIN_S = 2.0  # longest time before the work hears of a cancellation
_MAX_ERROR = 600  # characters
_HARMLESS = ("harmless", "capabilities")  # parts of an evaluation that attack nothing

OnProgress = Callable[[Mapping[str, Any]], None]
Cancelled = Callable[[], bool]


class EvaluationBackend(Protocol):
    """Evaluates models. One call works at a time, but a call may follow one that was killed."""

    def run(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        """Leaves `summary.json` and `evaluation/` in the folder, and continues what an earlier call left there.

        Args:
            request: As admitted.
            folder: Of this evaluation alone.
            on_progress: Takes `role`, `attack`, `variant`, `done`, `total`, `reused` and `outcomes`.
            cancelled: Asked often; once it is true, the call ends soon, in any way.

        Raises:
            RefusedError: It cannot be done, now or later.
            Exception: It failed; another attempt may succeed.
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
    chosen = {name: value for name, value in wanted.items() if value is not None}
    found: list[SampleView] = []
    total = 0
    for row in _rows(kept):
        if any(row.get(name) != value for name, value in chosen.items()):
            continue
        if offset <= total < offset + limit:
            found.append(_sample(row, show_harmful=show_harmful))
        total += 1
    return SamplePage(items=found, total=total, saved=kept.is_dir())


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for role in MODEL_ROLES:
        file = folder / f"{role}.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from (json.loads(line) for line in lines if line.strip())


def _sample(row: dict[str, Any], *, show_harmful: bool) -> SampleView:
    is_harmful = row.get("attack", "") not in _HARMLESS
    # A byte-level tokenizer may decode half a character to a lone surrogate, which UTF-8 cannot carry.
    texts = {name: str(row.get(name, "")).encode(errors="replace").decode() for name in ("prefill", "continuation")}
    return SampleView(
        role=row["role"],
        attack=row.get("attack", ""),
        variant=row["variant"],
        prompt_id=row["prompt_id"],
        seed=row.get("seed", 0),
        outcome=row.get("outcome"),
        harmful=is_harmful,
        **(texts if show_harmful or not is_harmful else dict.fromkeys(texts)),
    )


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
        self._store, self._backend, self._state = store, backend, state
        self._lease_s, self._max_attempts = lease_s, max_attempts
        self._retry_delay_s, self._idle_s = retry_delay_s, idle_s
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
                lease.cancel, ends_at = found.cancelling, asked_at + self._lease_s

        thread = threading.Thread(target=keep, name=f"lease-{claimed.evaluation.id}", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            lease.done.set()
            thread.join()


@dataclass
class _Lease:
    """A claim, as the thread that renews it last saw it."""

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
