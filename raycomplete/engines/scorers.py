"""Ray actors that host the frozen models, and the client that others call them through."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raycomplete.config import TeacherConfig
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import HeadSpec, load_head
from raycomplete.engines.dispatch import Dispatcher, ScoreCall
from raycomplete.engines.kv_store import ClusterKvStore, KvStore, digest
from raycomplete.engines.parity import check_parity
from raycomplete.engines.payload import HiddenArray, ScoreRequest, to_tensor
from raycomplete.engines.score_cache import ScoreCache
from raycomplete.engines.scoring_engine import PoolingEngine
from raycomplete.runtime.errors import QuarantinedSequenceError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.prometheus import begin, scored
from raycomplete.runtime.ray_calls import is_gone, wait_for
from raycomplete.runtime.types import ModelRole


@dataclass(frozen=True)
class ScorerOptions:
    """What a scorer needs to know besides its head spec."""

    role: ModelRole
    dtype: Any
    max_length: int
    use_gpu: bool
    teacher: TeacherConfig
    trust_remote_code: bool = False


_TASK_RETRIES = 2  # of what is no teacher


class Scorer:
    """One frozen model on a pooling engine. `TeacherClient` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself.

    Args:
        spec: Head of the model.
        options: See `ScorerOptions`.
        parity_requests: Sequences that the engine is proved on.
        note: Key under which the kv_store says what is being read.
        kv_store: Where that is said.
    """

    def __init__(
        self,
        spec: HeadSpec,
        options: ScorerOptions,
        parity_requests: list[ScoreRequest],
        note: str = "",
        kv_store: KvStore | None = None,
    ) -> None:
        begin(f"{options.role} scorer")
        self._spec = spec
        self._options = options
        self._parity_requests = parity_requests
        self._note = note
        self._kv_store = kv_store
        self._said: str | None = None  # what the process before this one said is not known
        teacher = options.teacher
        self._cache = ScoreCache(
            f"{spec.model_fingerprint}:{spec.tokenizer_hash}:{options.dtype}",
            int(teacher.cache_gib * 2**30),
            teacher.cache_dir,
            int(teacher.cache_disk_gib * 2**30),
        )
        self._engine: PoolingEngine | None = None
        self._stats: dict[str, Any] = {}
        self._tokens_read = 0
        self._seconds = 0.0

    def startup_stats(self) -> dict[str, Any]:
        """Start-up times, parity report and head spec; answering it means the scorer is ready."""
        self._ready_engine()
        return self._stats

    def score(self, requests: list[ScoreRequest], attempt: str = "") -> list[HiddenArray]:
        """[T, H] hidden states of each request's response rows; sequences read before are not read again.

        Args:
            requests: Sequences.
            attempt: Name of this call; the kv_store holds it while the engine reads, so that a death can be laid at the
                right door.
        """
        engine = self._ready_engine()
        started = time.perf_counter()
        arrays = [self._cache.get(request) for request in requests]
        # One batch may hold a sequence twice; it is read once.
        missing = list(dict.fromkeys(request for request, array in zip(requests, arrays, strict=True) if array is None))
        self._say(attempt if missing else "")
        fresh = dict(zip(missing, engine.hidden_states(missing), strict=True)) if missing else {}
        self._say("")
        for request, array in fresh.items():
            self._cache.put(request, array)
        tokens = sum(len(request.token_ids) - 1 for request in missing)
        seconds = time.perf_counter() - started if missing else 0.0
        self._tokens_read, self._seconds = self._tokens_read + tokens, self._seconds + seconds
        misses = sum(array is None for array in arrays)
        scored(tokens=tokens, seconds=seconds, hits=len(arrays) - misses, misses=misses)
        return [fresh[request] if array is None else array for request, array in zip(requests, arrays, strict=True)]

    def warm(self, requests: list[ScoreRequest]) -> None:
        """Reads sequences into the cache ahead of the call that needs them, without sending anything back."""
        self.score(requests)

    def stats(self) -> dict[str, float]:
        """Work done so far: tokens read by the engine, seconds in it, cache hits and misses."""
        return {
            "tokens": self._tokens_read,
            "seconds": self._seconds,
            "hits": self._cache.hits,
            "misses": self._cache.misses,
        }

    def _say(self, attempt: str) -> None:
        if self._kv_store is not None and attempt != self._said:
            self._kv_store.write(self._note, attempt)
            self._said = attempt

    def _ready_engine(self) -> PoolingEngine:
        """The engine, started and proved against transformers."""
        if self._engine is not None:
            return self._engine
        spec, options = self._spec, self._options
        started = time.perf_counter()
        engine = PoolingEngine(
            spec.path,
            dtype=options.dtype,
            max_length=options.max_length,
            use_gpu=options.use_gpu,
            gpu_memory_utilization=options.teacher.gpu_memory_utilization,
            max_num_batched_tokens=options.teacher.max_num_batched_tokens,
            trust_remote_code=options.trust_remote_code,
            tensor_parallel=options.teacher.tensor_parallel,
        )
        engine_start_s = time.perf_counter() - started
        parity = check_parity(
            engine,
            load_head(spec, dtype=TORCH_DTYPES[options.dtype]),
            Path(spec.path),
            self._parity_requests,
            role=options.role,
            dtype=options.dtype,
            tolerance=options.teacher.parity_tolerance,
            trust_remote_code=options.trust_remote_code,
        )
        self._engine = engine
        self._stats = {
            "role": options.role,
            "engine_start_s": engine_start_s,
            "start_s": time.perf_counter() - started,
            "parity": parity.to_json(),
            "head": spec.to_json(),
        }
        return engine


class ScorerHandle:
    """One replica of a scorer (implements `raycomplete.engines.dispatch.Replica`).

    Args:
        name: "base scorer", or "base scorer 2 of 3".
        actor: Handle of a `Scorer` actor.
        timeout_s: Longest wait for one call.
    """

    def __init__(self, name: str, actor: Any, timeout_s: float) -> None:
        self.name = name
        self.actor = actor
        self._timeout_s = timeout_s

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        """See `Replica`. Ray itself must not retry: only the dispatcher counts deaths and knows other replicas."""
        return self.actor.score.options(max_task_retries=0).remote(requests, attempt)

    def get(self, reference: Any) -> list[HiddenArray]:
        """See `Replica`."""
        arrays: list[HiddenArray] = self.wait(reference, "a batch of scores")
        return arrays

    def wait(self, reference: Any, what: str, timeout_s: float | None = None) -> Any:
        """Waits for anything that this replica delivers."""
        return wait_for(reference, who=self.name, what=what, timeout_s=timeout_s or self._timeout_s)

    def is_gone(self) -> bool:
        """See `Replica`."""
        return is_gone(self.actor)


class TeacherClient:
    """Handle on the replicas of one scorer; picklable, so training workers can hold it.

    Results are those of one replica, in the same order, up to rounding in batches of another size. A process never has
    more than `teacher.max_in_flight` calls under way, so its scores fill no more of the object store than
    max_in_flight * max_num_batched_tokens rows.

    Args:
        role: base, aligned or student.
        replicas: Handles of the actors.
        teacher: Bounds and limits.
        prefix: Of this group of actors on the kv_store.
        record_folder: Where sequences that are quarantined are recorded; None records nothing.
    """

    def __init__(
        self,
        role: ModelRole,
        replicas: Sequence[ScorerHandle],
        teacher: TeacherConfig,
        prefix: str,
        record_folder: Path | None = None,
    ) -> None:
        self.role = role
        self._replicas = list(replicas)
        self._teacher = teacher
        self._prefix = prefix
        self._record_folder = record_folder
        self._kv_store = ClusterKvStore()
        self._dispatcher = Dispatcher(self._replicas, teacher, self._kv_store, prefix, self._record)
        self._warming: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts with nothing under way."""
        return (TeacherClient, (self.role, self._replicas, self._teacher, self._prefix, self._record_folder))

    @classmethod
    def start(
        cls,
        spec: HeadSpec,
        options: ScorerOptions,
        parity_requests: list[ScoreRequest],
        *,
        num_cpus: float,
        num_gpus: float,
        environment: dict[str, str],
        placement: Sequence[Any] = (),
        record_folder: Path | None = None,
    ) -> TeacherClient:
        """Asks Ray for `teacher.replicas` actors and returns at once; `wait_until_ready` waits for them.

        Args:
            spec: Head of the model.
            options: Of every replica.
            parity_requests: Sequences that each replica is proved on.
            num_cpus: Logical CPUs of one replica.
            num_gpus: GPUs of one replica, where GPUs are used.
            environment: See `raycomplete.engines.spec.engine_environment`.
            placement: Ray's scheduling strategy of each replica; empty lets Ray choose.
            record_folder: See the class.
        """
        count = options.teacher.replicas
        prefix = f"{options.role}-{uuid.uuid4().hex}"
        replicas = []
        for index in range(count):
            name = f"{options.role} scorer" if count == 1 else f"{options.role} scorer {index + 1} of {count}"
            actor = (
                ray.remote(Scorer)
                .options(
                    num_cpus=num_cpus,
                    num_gpus=num_gpus if options.use_gpu else 0,
                    runtime_env={"env_vars": environment},
                    max_restarts=-1,  # an idle actor holds no engine that could crash in a loop; callers bound retries
                    max_task_retries=_TASK_RETRIES,
                    scheduling_strategy=placement[index] if placement else None,
                )
                .remote(spec, options, parity_requests, f"{prefix}/reads/{name}", ClusterKvStore())
            )
            replicas.append(ScorerHandle(name, actor, options.teacher.timeout_s))
        return cls(options.role, replicas, options.teacher, prefix, record_folder)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every replica is ready; returns the stats of the one whose parity is worst."""
        references = [replica.actor.startup_stats.remote() for replica in self._replicas]
        stats = [
            replica.wait(reference, "its start", timeout_s)
            for replica, reference in zip(self._replicas, references, strict=True)
        ]
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
        """As `submit`, from (token ids, number of prompt tokens) pairs."""
        return self.submit([ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences])

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Lets the replicas read sequences ahead. Nobody waits for it: what is not read yet is read when asked."""
        if self._warming:
            _, self._warming = ray.wait(self._warming, num_returns=len(self._warming), timeout=0)
        if len(self._warming) >= self._teacher.max_in_flight:
            return  # they are behind already
        requests = [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences]
        requests = [request for request in requests if not self._dispatcher.is_quarantined(request)]
        for replica, places in zip(self._replicas, self._dispatcher.deal(requests), strict=True):
            if places:
                part = [requests[place] for place in places]
                self._warming.append(replica.actor.warm.options(max_task_retries=0).remote(part))

    def collect_tensors(self, call: ScoreCall) -> list[torch.Tensor]:
        """As `collect`, as tensors on the CPU, those of a QuarantinedSequenceError too."""
        try:
            return [to_tensor(array) for array in self.collect(call)]
        except QuarantinedSequenceError as error:
            error.partial = [None if array is None else to_tensor(array) for array in error.partial]
            raise

    def stats(self) -> dict[str, float]:
        """Work done so far by all replicas (see `Scorer.stats`); seconds are summed."""
        references = [replica.actor.stats.remote() for replica in self._replicas]
        found = [
            replica.wait(reference, "its statistics")
            for replica, reference in zip(self._replicas, references, strict=True)
        ]
        return {name: sum(item[name] for item in found) for name in found[0]}

    def stop(self) -> None:
        """Ends the actors and frees their memory."""
        for replica in self._replicas:
            ray.kill(replica.actor)
        with suppress(Exception):  # notes of a cluster that is gone are gone too
            self._kv_store.clear(self._prefix)

    def _record(self, request: ScoreRequest, deaths: int) -> None:
        """One file for each sequence, so that several processes may write; no tokens, since they may be harmful."""
        if self._record_folder is None:
            return
        name = digest(request)
        record = {
            "sequence": name,
            "tokens": len(request.token_ids),
            "prompt_tokens": request.num_prompt_tokens,
            "role": self.role,
            "scorers_killed_alone": deaths,
        }
        write_json(self._record_folder / f"{self.role}-{name}.json", record)
