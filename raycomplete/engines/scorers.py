"""Ray actors that host the frozen models, and the client that others call them through."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch

from raycomplete.config import TeacherConfig
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import HeadSpec, load_head
from raycomplete.engines.dispatch import Dispatcher, KvStore, ScoreCall, ScorerReplica
from raycomplete.engines.score_cache import HiddenArray, ScoreCache, ScoreRequest, to_tensor
from raycomplete.engines.scoring_engine import PoolingEngine, check_parity
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import QuarantinedSequenceError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.prometheus import begin, scored
from raycomplete.runtime.types import ModelRole

_TASK_RETRIES = 2  # of calls other than scores, which the dispatcher repeats


class Scorer:
    """One frozen model on a pooling engine. `TeacherClient` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself.

    Args:
        parity_requests: Sequences that the parity gate compares.
        note: Key under which `kv_store` says what is being read.
    """

    def __init__(
        self,
        role: ModelRole,
        head: HeadSpec,
        spec: EngineSpec,
        teacher: TeacherConfig,
        parity_requests: list[ScoreRequest],
        note: str,
        kv_store: KvStore,
    ) -> None:
        begin(f"{role} scorer")
        self._role, self._head, self._spec, self._teacher = role, head, spec, teacher
        self._parity_requests, self._note, self._kv_store = parity_requests, note, kv_store
        self._noted: str | None = None  # what the process before this one noted is not known
        self._cache = ScoreCache(int(teacher.cache_gib * 2**30))
        self._engine: PoolingEngine | None = None
        self._startup_stats: dict[str, Any] = {}
        self._tokens_read, self._seconds = 0, 0.0

    def startup_stats(self) -> dict[str, Any]:
        """Returns start-up times, parity report and head spec; an answer means that the scorer is ready."""
        self._ready_engine()
        return self._startup_stats

    def score(self, requests: list[ScoreRequest], attempt: str = "") -> list[HiddenArray]:
        """Returns [T, H] hidden states of each request's response rows; sequences read before are not read again.

        Args:
            attempt: Name of this call, in the store while the engine reads: a death counts against what was read.
        """
        engine = self._ready_engine()
        started = time.perf_counter()
        arrays = [self._cache.get(request) for request in requests]
        # One batch may hold a sequence twice; it is read once.
        missing = list(dict.fromkeys(request for request, array in zip(requests, arrays, strict=True) if array is None))
        self._note_reading(attempt if missing else "")
        fresh = dict(zip(missing, engine.hidden_states(missing), strict=True)) if missing else {}
        self._note_reading("")
        for request, array in fresh.items():
            self._cache.put(request, array)
        tokens = sum(len(request.token_ids) - 1 for request in missing)
        seconds = time.perf_counter() - started if missing else 0.0
        self._tokens_read, self._seconds = self._tokens_read + tokens, self._seconds + seconds
        misses = sum(array is None for array in arrays)
        scored(tokens=tokens, seconds=seconds, hits=len(arrays) - misses, misses=misses)
        return [fresh[request] if array is None else array for request, array in zip(requests, arrays, strict=True)]

    def warm(self, requests: list[ScoreRequest]) -> None:
        """Reads sequences into the cache ahead of the call that needs them."""
        self.score(requests)

    def stats(self) -> dict[str, float]:
        """Returns the work done so far: tokens read by the engine, seconds in it, cache hits and misses."""
        hits, misses = self._cache.hits, self._cache.misses
        return {"tokens": self._tokens_read, "seconds": self._seconds, "hits": hits, "misses": misses}

    def _note_reading(self, attempt: str) -> None:
        if attempt != self._noted:
            self._kv_store.write(self._note, attempt)
            self._noted = attempt

    def _ready_engine(self) -> PoolingEngine:
        """Returns the engine, started and compared with transformers at the first call."""
        if self._engine is not None:
            return self._engine
        started = time.perf_counter()
        engine = PoolingEngine(self._spec)
        engine_start_s = time.perf_counter() - started
        head, tolerance = load_head(self._head, dtype=TORCH_DTYPES[self._spec.dtype]), self._teacher.parity_tolerance
        parity = check_parity(engine, head, self._parity_requests, role=self._role, tolerance=tolerance)
        self._engine = engine
        self._startup_stats = {
            "role": self._role,
            "engine_start_s": engine_start_s,
            "start_s": time.perf_counter() - started,
            "parity": asdict(parity),
            "head": asdict(self._head),
        }
        return engine


class TeacherClient:
    """Handle on the replicas of one scorer; picklable, so training workers can hold it.

    Results are those of one replica, in the same order, up to rounding in batches of another size. A process never has
    more than `teacher.max_in_flight` calls under way, so its scores fill no more of the object store than
    max_in_flight * max_num_batched_tokens rows.

    Args:
        prefix: Names this group of actors in the cluster's key-value store.
        record_folder: Where quarantined sequences are recorded, if anywhere.
    """

    def __init__(
        self,
        role: ModelRole,
        replicas: Sequence[ScorerReplica],
        teacher: TeacherConfig,
        prefix: str,
        record_folder: Path | None = None,
    ) -> None:
        self.role, self._replicas, self._teacher = role, list(replicas), teacher
        self._prefix, self._record_folder = prefix, record_folder
        self._kv_store = KvStore()
        self._dispatcher = Dispatcher(self._replicas, teacher, self._kv_store, prefix, self._record)
        self._warming: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the handle without the calls under way."""
        return (TeacherClient, (self.role, self._replicas, self._teacher, self._prefix, self._record_folder))

    @classmethod
    def start(
        cls,
        role: ModelRole,
        head: HeadSpec,
        spec: EngineSpec,
        teacher: TeacherConfig,
        parity_requests: list[ScoreRequest],
        *,
        strategies: Sequence[Any] = (),
        record_folder: Path | None = None,
    ) -> TeacherClient:
        """Asks Ray for `teacher.replicas` actors and returns at once; `wait_until_ready` waits for them.

        Args:
            strategies: Ray's scheduling strategy of each replica; empty lets Ray choose.
        """
        count = teacher.replicas
        prefix = f"{role}-{uuid.uuid4().hex}"
        settings = spec.resources() | {
            "max_restarts": -1,  # an idle actor holds no engine that could crash in a loop; callers bound retries
            "max_task_retries": _TASK_RETRIES,
        }
        replicas = []
        for index, strategy in enumerate(list(strategies) or [None] * count):
            name = f"{role} scorer" if count == 1 else f"{role} scorer {index + 1} of {count}"
            actor = ray.remote(Scorer).options(**settings, scheduling_strategy=strategy)
            handle = actor.remote(role, head, spec, teacher, parity_requests, f"{prefix}/reads/{name}", KvStore())
            replicas.append(ScorerReplica(name, handle, teacher.timeout_s))
        return cls(role, replicas, teacher, prefix, record_folder)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every replica is ready; returns the stats of the replica whose parity is worst."""
        stats = self._ask("startup_stats", "its start", timeout_s)
        worst: dict[str, Any] = max(stats, key=lambda item: item["parity"]["mean_expected_difference"])
        return worst | {"start_s": max(item["start_s"] for item in stats), "num_replicas": len(stats)}

    def submit(self, requests: Sequence[ScoreRequest]) -> ScoreCall:
        """Starts scoring and returns what `collect` waits for."""
        return self._dispatcher.submit(requests)

    def collect(self, call: ScoreCall) -> list[HiddenArray]:
        """Waits for the scores that `submit` started. Dead replicas are waited for, and others asked meanwhile.

        Raises:
            QuarantinedSequenceError: Some sequences were quarantined; it holds the scores of the others.
            ProcessDiedError: Replicas died for longer than `teacher.retry_timeout_s`, or whatever they read.
            WaitTimeoutError: A call took longer than `teacher.timeout_s`.
        """
        arrays = self._dispatcher.collect(call)
        found = [array for array in arrays if array is not None]
        if len(found) < len(arrays):
            raise QuarantinedSequenceError(
                f"{len(arrays) - len(found)} of {len(arrays)} sequences killed the {self.role} scorer again and again "
                "and were quarantined.",
                f"They are recorded in {self._record_folder}." if self._record_folder else "",
                places=sorted(call.quarantined),
                partial=arrays,
            )
        return found

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> ScoreCall:
        """Starts scoring (token ids, number of prompt tokens) pairs; otherwise as `submit`."""
        return self.submit([ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences])

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Lets the replicas read sequences ahead. Nobody waits for it: what is not read yet is read when asked."""
        if self._warming:
            _, self._warming = ray.wait(self._warming, num_returns=len(self._warming), timeout=0)
        if len(self._warming) >= self._teacher.max_in_flight:
            return  # they are behind already
        requests = [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences]
        requests = [request for request in requests if not self._dispatcher.is_quarantined(request)]
        for replica, indices in zip(self._replicas, self._dispatcher.shard(requests), strict=True):
            if indices:
                part = [requests[index] for index in indices]
                self._warming.append(replica.actor.warm.options(max_task_retries=0).remote(part))

    def collect_tensors(self, call: ScoreCall) -> list[torch.Tensor]:
        """Waits as `collect` does and returns tensors on the CPU, also inside a QuarantinedSequenceError."""
        try:
            return [to_tensor(array) for array in self.collect(call)]
        except QuarantinedSequenceError as error:
            error.partial = [None if array is None else to_tensor(array) for array in error.partial]
            raise

    def stats(self) -> dict[str, float]:
        """Returns the work done so far by all replicas (see `Scorer.stats`); seconds are summed."""
        found = self._ask("stats", "its statistics")
        return {name: sum(item[name] for item in found) for name in found[0]}

    def _ask(self, method: str, what: str, timeout_s: float | None = None) -> list[Any]:
        """Calls a method of every replica at once, and waits for their answers."""
        references = [getattr(replica.actor, method).remote() for replica in self._replicas]
        pairs = zip(self._replicas, references, strict=True)
        return [replica.wait(reference, what, timeout_s) for replica, reference in pairs]

    def stop(self) -> None:
        for replica in self._replicas:
            ray.kill(replica.actor)
        with suppress(Exception):  # notes of a cluster that is gone are gone too
            self._kv_store.clear(self._prefix)

    def _record(self, request: ScoreRequest, deaths: int) -> None:
        """Writes one file for each sequence, so that several processes may write; no tokens, as they may be harmful."""
        if self._record_folder is None:
            return
        record = {
            "sequence": request.name,
            "tokens": len(request.token_ids),
            "prompt_tokens": request.num_prompt_tokens,
            "role": self.role,
            "scorers_killed_alone": deaths,
        }
        write_json(self._record_folder / f"{self.role}-{request.name}.json", record)
