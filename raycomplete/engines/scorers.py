"""Ray actors that host the frozen models, and the client that others call them through, although actors may die.

Reading a sequence again gives the same scores, so a call whose scorer died is sent again, after a pause that doubles,
to the replica with the least to do. Only a call that was being read when its scorer died counts a death. A batch that
has killed `MAX_ATTEMPTS` scorers is halved, each half that kills again is halved at once, and a sequence that has
killed `MAX_ATTEMPTS` scorers alone is quarantined for good.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import ray
import torch
from ray.experimental import internal_kv

from raycomplete.config import TeacherConfig
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import HeadSpec, load_head
from raycomplete.engines.score_cache import HiddenArray, ScoreCache, ScoreRequest, to_tensor
from raycomplete.engines.scoring_engine import PoolingEngine, check_parity
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import ProcessDiedError, QuarantinedSequenceError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.prometheus import begin, record
from raycomplete.runtime.ray_calls import is_gone, wait_for
from raycomplete.runtime.types import ModelRole

CACHE_BYTES = 2 * 2**30  # scores that one actor keeps
_TASK_RETRIES = 2  # of calls other than scores, which the dispatcher repeats
MAX_ATTEMPTS = 3
MAX_IN_FLIGHT = 8  # calls that one process has sent and not collected; they bound what fills the object store
RETRY_TIMEOUT_S = 1800.0  # longest time for one batch whose scorers die, their restarts included
BATCH_TIMEOUT_S = 600.0  # longest wait for one call
_NAMESPACE = "raycomplete"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SUSPECT_IN_A_ROW = 3  # sequences quarantined without one answer in between: then it is not the sequences' fault
_REMEMBERED = 100_000  # sequences whose replica is known; on-policy, most are never seen again


class KvStore:
    """Notes in the key-value store of the cluster's head. They outlive a scorer, and every process sees them."""

    def write(self, key: str, value: str) -> None:
        internal_kv._internal_kv_put(key, value, namespace=_NAMESPACE)

    def read(self, key: str) -> str:
        return (internal_kv._internal_kv_get(key, namespace=_NAMESPACE) or b"").decode()

    def below(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]

    def clear(self, prefix: str) -> None:
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


@dataclass
class ScorerReplica:
    """One replica of a scorer, as its callers see it; its name is "base scorer" or "base scorer 2 of 3"."""

    name: str
    actor: Any

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        # Ray itself must not retry: only the dispatcher counts deaths and knows the other replicas.
        return self.actor.score.options(max_task_retries=0).remote(requests, attempt)

    def wait(self, reference: Any, what: str = "a batch of scores", timeout_s: float = BATCH_TIMEOUT_S) -> Any:
        return wait_for(reference, who=self.name, what=what, timeout_s=timeout_s)

    def is_gone(self) -> bool:
        return is_gone(self.actor)


@dataclass(eq=False)
class Shard:
    """Sequences that one replica reads in one call; `indices` are their positions in the batch."""

    indices: list[int]
    replica: int
    deaths: int = 0  # scorers that died while they read just these sequences
    proven: bool = False  # one half of a shard that has killed MAX_ATTEMPTS scorers
    attempt: str = ""  # name of the present call
    reference: Any = None


@dataclass(eq=False)
class ScoreCall:
    """A batch under way: results in the order of the requests, and the indices that will never have a score."""

    requests: list[ScoreRequest]
    results: list[HiddenArray | None]
    waiting: deque[Shard] = field(default_factory=deque)
    sent: deque[Shard] = field(default_factory=deque)
    quarantined: list[int] = field(default_factory=list)
    first_death: float | None = None

    def tokens(self, part: Shard) -> int:
        return sum(len(self.requests[index].token_ids) for index in part.indices)


def cut(indices: Sequence[int], requests: Sequence[ScoreRequest], max_tokens: int) -> list[list[int]]:
    """Cuts one replica's share into calls of at most `max_tokens`; a longer sequence is a call by itself."""
    calls: list[list[int]] = []
    filled = 0
    for index in indices:
        tokens = len(requests[index].token_ids)
        if not calls or filled + tokens > max_tokens:
            calls.append([])
            filled = 0
        calls[-1].append(index)
        filled += tokens
    return calls


class Dispatcher:
    """Shares batches between replicas; `prefix` names their group in the store, `pause` is replaced in tests."""

    def __init__(
        self,
        replicas: Sequence[ScorerReplica],
        max_tokens: int,
        kv_store: KvStore,
        prefix: str,
        on_quarantine: Callable[[ScoreRequest, int], None],
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._replicas, self._max_tokens, self._max_in_flight = list(replicas), max_tokens, max_in_flight
        self._kv_store, self._prefix, self._on_quarantine, self._pause = kv_store, prefix, on_quarantine, pause
        self._readers: OrderedDict[int, int] = OrderedDict()  # by hash of a sequence; a mix-up costs one more reading
        self._quarantined: set[str] = set()
        self._loads = [0] * len(self._replicas)
        self._queue: deque[ScoreCall] = deque()  # calls with shards that are not sent, in order
        self._lock = RLock()  # one thread may submit while another collects
        self._in_flight = self._deaths_in_a_row = self._suspects_in_a_row = 0

    def submit(self, requests: Sequence[ScoreRequest]) -> ScoreCall:
        """Starts reading a batch as far as `max_in_flight` allows; the rest is sent as scores are taken."""
        call = ScoreCall(list(requests), [None] * len(requests))
        self._learn_quarantined()
        with self._lock:
            calls = [cut(indices, call.requests, self._max_tokens) for indices in self.shard(call.requests)]
            for turn in range(max(map(len, calls))):  # in turns, so that every replica starts at once
                call.waiting += [
                    Shard(parts[turn], replica) for replica, parts in enumerate(calls) if turn < len(parts)
                ]
            self._queue.append(call)
            self._fill()
        return call

    def shard(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        """Returns the indices of each replica's requests: longest first, each to the replica with the fewest tokens.

        A sequence that was read before goes where its scores are cached.
        """
        with self._lock:
            shards: list[list[int]] = [[] for _ in self._replicas]
            loads = [0] * len(self._replicas)
            taken: dict[ScoreRequest, int] = {}  # a sequence that stands twice in the batch is read once
            for index in sorted(range(len(requests)), key=lambda number: -len(requests[number].token_ids)):
                request = requests[index]
                if request not in taken:
                    known = self._readers.get(hash(request))
                    taken[request] = min(range(len(loads)), key=loads.__getitem__) if known is None else known
                    loads[taken[request]] += len(request.token_ids)
                    self._readers[hash(request)] = taken[request]
                    if len(self._readers) > _REMEMBERED:
                        self._readers.popitem(last=False)
                shards[taken[request]].append(index)
            return [sorted(indices) for indices in shards]

    def is_quarantined(self, request: ScoreRequest) -> bool:
        return bool(self._quarantined) and request.name in self._quarantined

    def collect(self, call: ScoreCall) -> list[HiddenArray | None]:
        """Waits for the scores of a batch; None stands for a sequence that was quarantined."""
        try:
            while True:
                with self._lock:
                    if not call.waiting and not call.sent:
                        return call.results
                    if not call.sent and not self._send(call):  # one slot is kept free for the call that is waited for
                        continue
                    part = call.sent[0]
                try:
                    arrays = self._replicas[part.replica].wait(part.reference)
                except ProcessDiedError as error:
                    self._take_back(call, part)
                    self._learn(call, part, error)
                    continue
                self._take_back(call, part)
                for index, array in zip(part.indices, arrays, strict=True):
                    call.results[index] = array
                self._deaths_in_a_row = self._suspects_in_a_row = 0
                with self._lock:
                    self._fill()
        except BaseException:
            for part in list(call.sent):  # free the slots of a call whose scores nobody will take
                self._take_back(call, part)
            with self._lock:
                call.waiting.clear()
            raise

    def _fill(self) -> None:
        while self._queue:
            if not self._queue[0].waiting:
                self._queue.popleft()  # also where nothing may be sent: a call holds its results
            elif self._in_flight < self._max_in_flight - 1:
                self._send(self._queue[0])
            else:
                break

    def _learn_quarantined(self) -> None:
        """Reads the store: another process, or another batch of this one, may have found a culprit meanwhile."""
        self._quarantined |= {key.rsplit("/", 1)[1] for key in self._kv_store.below(f"{self._prefix}/quarantined/")}

    def _send(self, call: ScoreCall) -> bool:
        """Sends the next shard of a call without its quarantined sequences; returns False if nothing was left."""
        part = call.waiting.popleft()
        known = [index for index in part.indices if self.is_quarantined(call.requests[index])]
        call.quarantined += known
        part.indices = [index for index in part.indices if index not in known]
        if not part.indices:
            return False
        part.attempt = uuid.uuid4().hex
        part.reference = self._replicas[part.replica].send([call.requests[i] for i in part.indices], part.attempt)
        call.sent.append(part)
        self._in_flight += 1
        self._loads[part.replica] += call.tokens(part)
        return True

    def _take_back(self, call: ScoreCall, part: Shard) -> None:
        with self._lock:
            call.sent.remove(part)
            part.reference = None
            self._in_flight -= 1
            self._loads[part.replica] -= call.tokens(part)

    def _learn(self, call: ScoreCall, part: Shard, error: ProcessDiedError) -> None:
        """Counts a death if this shard is to blame, and queues the shard to be sent again, whole or in halves."""
        now = time.monotonic()
        call.first_death = now if call.first_death is None else call.first_death
        if now - call.first_death > RETRY_TIMEOUT_S:
            error.remedy = f"Scorers of this batch have been dying for {now - call.first_death:.0f} s. {error.remedy}"
            raise error
        self._deaths_in_a_row += 1
        self._learn_quarantined()
        part.deaths += self._kv_store.read(f"{self._prefix}/reads/{self._replicas[part.replica].name}") == part.attempt
        alone, parts = len(part.indices) == 1, [part]
        if part.deaths >= (1 if part.proven and not alone else MAX_ATTEMPTS):
            if alone:
                self._quarantine(call, part, error)
                return
            middle = len(part.indices) // 2
            halves = part.indices[:middle], part.indices[middle:]
            parts = [Shard(indices, part.replica, proven=True) for indices in halves]
        longest = min(_FIRST_PAUSE_S * 2.0 ** (self._deaths_in_a_row - 1), _LONGEST_PAUSE_S)
        self._pause(longest * random.uniform(0.5, 1.0))  # so that clients do not all come back at the same moment
        alive = [index for index, replica in enumerate(self._replicas) if not replica.is_gone()]
        if not alive:
            raise error
        with self._lock:
            for item in parts:
                item.replica = min(alive, key=self._loads.__getitem__)
            call.waiting.extendleft(reversed(parts))

    def _quarantine(self, call: ScoreCall, part: Shard, error: ProcessDiedError) -> None:
        self._suspects_in_a_row += 1
        if self._suspects_in_a_row >= _SUSPECT_IN_A_ROW:
            error.remedy = f"It dies whatever it reads, so no sequence is to blame. {error.remedy}"
            raise error
        request = call.requests[part.indices[0]]
        self._quarantined.add(request.name)
        self._kv_store.write(f"{self._prefix}/quarantined/{request.name}", str(part.deaths))
        call.quarantined.append(part.indices[0])
        self._on_quarantine(request, part.deaths)


class Scorer:
    """One frozen model on a pooling engine, run as a Ray actor by `TeacherClient`.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine again by itself. `note` is the key under which the
    store says what is being read.
    """

    def __init__(
        self,
        role: ModelRole,
        head: HeadSpec,
        spec: EngineSpec,
        parity_requests: list[ScoreRequest],
        note: str,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        begin(f"{role} scorer")
        self._role, self._head, self._spec = role, head, spec
        self._parity_requests, self._note, self._kv_store = parity_requests, note, KvStore()
        self._noted: str | None = None  # what the process before this one noted is not known
        self._cache = ScoreCache(cache_bytes)
        self._engine: PoolingEngine | None = None
        self._startup_stats: dict[str, Any] = {}
        self._tokens_read, self._seconds = 0, 0.0

    def startup_stats(self) -> dict[str, Any]:
        """Returns start-up times, parity report and head spec; an answer means that the scorer is ready."""
        self._ready_engine()
        return self._startup_stats

    def score(self, requests: list[ScoreRequest], attempt: str = "") -> list[HiddenArray]:
        """Returns [T, H] hidden states of each request's response rows; sequences read before are not read again.

        `attempt` names this call in the store while the engine reads: a death counts against what was read.
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
        record("teacher_tokens", tokens)
        record("teacher_seconds", seconds)
        record("score_cache_hits", len(arrays) - misses)
        record("score_cache_misses", misses)
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
        if self._engine is None:
            started = time.perf_counter()
            engine = PoolingEngine(self._spec)
            engine_start_s = time.perf_counter() - started
            head = load_head(self._head, dtype=TORCH_DTYPES[self._spec.dtype])
            parity = check_parity(engine, head, self._parity_requests, role=self._role)
            self._engine = engine
            self._startup_stats = {
                "role": self._role,
                "engine_start_s": engine_start_s,
                "start_s": time.perf_counter() - started,
                "parity": asdict(parity),
                "head": asdict(self._head),
            }
        return self._engine


class TeacherClient:
    """Handle on the replicas of one scorer; picklable, so training workers can hold it.

    Results are those of one replica, in the same order, up to rounding in batches of another size. `prefix` names this
    group of actors in the cluster's key-value store; quarantined sequences are recorded in `record_folder`.
    """

    def __init__(
        self,
        role: ModelRole,
        replicas: Sequence[ScorerReplica],
        max_tokens: int,
        prefix: str,
        record_folder: Path | None = None,
    ) -> None:
        self.role, self._replicas, self._max_tokens = role, list(replicas), max_tokens
        self._prefix, self._record_folder = prefix, record_folder
        self._dispatcher = Dispatcher(self._replicas, max_tokens, KvStore(), prefix, self._record)
        self._warming: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the handle without the calls under way."""
        return (TeacherClient, (self.role, self._replicas, self._max_tokens, self._prefix, self._record_folder))

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
        cache_bytes: int = CACHE_BYTES,
    ) -> TeacherClient:
        """Asks Ray for `teacher.replicas` actors and returns at once; `wait_until_ready` waits for them."""
        count, prefix = teacher.replicas, f"{role}-{uuid.uuid4().hex}"
        settings = spec.resources() | {
            "max_restarts": -1,  # an idle actor holds no engine that could crash in a loop; callers bound retries
            "max_task_retries": _TASK_RETRIES,
        }
        replicas = []
        for index, strategy in enumerate(list(strategies) or [None] * count):
            name = f"{role} scorer" if count == 1 else f"{role} scorer {index + 1} of {count}"
            actor = ray.remote(Scorer).options(**settings, scheduling_strategy=strategy)
            handle = actor.remote(role, head, spec, parity_requests, f"{prefix}/reads/{name}", cache_bytes)
            replicas.append(ScorerReplica(name, handle))
        return cls(role, replicas, teacher.max_num_batched_tokens, prefix, record_folder)

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

        A QuarantinedSequenceError holds the scores of the other sequences.
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
        if len(self._warming) >= MAX_IN_FLIGHT:
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
        found = self._ask("stats", "its statistics", 600.0)
        return {name: sum(item[name] for item in found) for name in found[0]}

    def _ask(self, method: str, what: str, timeout_s: float) -> list[Any]:
        references = [getattr(replica.actor, method).remote() for replica in self._replicas]
        pairs = zip(self._replicas, references, strict=True)
        return [replica.wait(reference, what, timeout_s) for replica, reference in pairs]

    def stop(self) -> None:
        for replica in self._replicas:
            ray.kill(replica.actor)
        with suppress(Exception):  # notes of a cluster that is gone are gone too
            KvStore().clear(self._prefix)

    def _record(self, request: ScoreRequest, deaths: int) -> None:
        """Writes one file for each sequence, so that several processes may write; no tokens, as they may be harmful."""
        if self._record_folder is not None:
            row = {
                "sequence": request.name,
                "tokens": len(request.token_ids),
                "prompt_tokens": request.num_prompt_tokens,
                "role": self.role,
                "scorers_killed_alone": deaths,
            }
            write_json(self._record_folder / f"{self.role}-{request.name}.json", row)
