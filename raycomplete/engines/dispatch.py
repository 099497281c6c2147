"""Sends batches to the replicas of a scorer, and collects every score that can be had although scorers may die.

Reading a sequence again gives the same scores, so a call whose scorer died is sent again, after a pause that doubles,
to the replica with the least to do. Only a call that was being read when its scorer died counts a death. A batch that
has killed `max_attempts` scorers is halved, each half that kills again is halved at once, and a sequence that has
killed `max_attempts` scorers alone is quarantined for good.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from ray.experimental import internal_kv

from raycomplete.config import TeacherConfig
from raycomplete.engines.score_cache import HiddenArray, ScoreRequest
from raycomplete.runtime.errors import ProcessDiedError
from raycomplete.runtime.ray_calls import is_gone, wait_for

_NAMESPACE = "raycomplete"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SUSPECT_IN_A_ROW = 3  # sequences quarantined without one answer in between: then it is not the sequences' fault


class KvStore:
    """Notes in the key-value store of the cluster's head. They outlive a scorer, and every process sees them.

    Scorers note what they read, and dispatchers which sequences are quarantined. Picklable: it holds nothing.
    """

    def write(self, key: str, value: str) -> None:
        internal_kv._internal_kv_put(key, value, namespace=_NAMESPACE)

    def read(self, key: str) -> str:
        """Returns a note, or an empty string where there is none."""
        return (internal_kv._internal_kv_get(key, namespace=_NAMESPACE) or b"").decode()

    def below(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]

    def clear(self, prefix: str) -> None:
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


class ScorerReplica:
    """One replica of a scorer, as its callers see it.

    Args:
        name: "base scorer", or "base scorer 2 of 3".
    """

    def __init__(self, name: str, actor: Any, timeout_s: float) -> None:
        self.name = name
        self.actor = actor
        self._timeout_s = timeout_s

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        """Starts reading and returns a reference.

        Ray itself must not retry: only the dispatcher counts deaths and knows the other replicas.
        """
        return self.actor.score.options(max_task_retries=0).remote(requests, attempt)

    def get(self, reference: Any) -> list[HiddenArray]:
        """Waits for the scores of a reference.

        Raises:
            ProcessDiedError: The scorer died.
            WaitTimeoutError: It took longer than the limit of a call.
        """
        arrays: list[HiddenArray] = self.wait(reference, "a batch of scores")
        return arrays

    def wait(self, reference: Any, what: str, timeout_s: float | None = None) -> Any:
        """Waits for anything else that this replica delivers."""
        return wait_for(reference, who=self.name, what=what, timeout_s=timeout_s or self._timeout_s)

    def is_gone(self) -> bool:
        """Tells whether the actor died and Ray will not start it again."""
        return is_gone(self.actor)


class CacheAffinity:
    """Remembers which replica read a sequence, so that the sequence goes where its scores are cached.

    Args:
        capacity: Sequences that are remembered, the oldest forgotten first: on-policy, most are never seen again.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._found: OrderedDict[int, int] = OrderedDict()  # by hash: a mix-up costs one more reading

    def get(self, request: ScoreRequest) -> int | None:
        return self._found.get(hash(request))

    def put(self, request: ScoreRequest, replica: int) -> None:
        self._found[hash(request)] = replica
        if len(self._found) > self._capacity:
            self._found.popitem(last=False)


def shard(requests: Sequence[ScoreRequest], affinity: CacheAffinity, num_replicas: int) -> list[list[int]]:
    """Shards a batch over replicas: longest sequence first, each to the replica with the fewest tokens so far.

    Args:
        affinity: Sends sequences where they were read before, and learns where the others go.

    Returns:
        For each replica the indices of its requests, in the order of the batch.
    """
    shards: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [0] * num_replicas
    taken: dict[ScoreRequest, int] = {}  # a sequence that stands twice in the batch is read once
    for index in sorted(range(len(requests)), key=lambda number: -len(requests[number].token_ids)):
        request = requests[index]
        if request not in taken:
            known = affinity.get(request)
            taken[request] = min(range(num_replicas), key=loads.__getitem__) if known is None else known
            loads[taken[request]] += len(request.token_ids)
            affinity.put(request, taken[request])
        shards[taken[request]].append(index)
    return [sorted(indices) for indices in shards]


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


@dataclass(eq=False)
class Shard:
    """Sequences that one replica reads in one call.

    Attributes:
        indices: Positions of the sequences in their batch.
        deaths: Scorers that died while they read just these sequences.
        proven: True for one half of a shard that has killed `max_attempts` scorers.
        attempt: Name of the present call.
    """

    indices: list[int]
    replica: int
    deaths: int = 0
    proven: bool = False
    attempt: str = ""
    reference: Any = None


@dataclass(eq=False)
class ScoreCall:
    """A batch under way.

    Attributes:
        results: Scores in the order of the requests, None where there is none yet.
        waiting: Shards that are not sent yet.
        sent: Shards that are sent, oldest first.
        quarantined: Indices of the sequences that will never have a score.
        first_death: Time of the first death of a scorer over this batch, seconds.
    """

    requests: list[ScoreRequest]
    results: list[HiddenArray | None]
    waiting: deque[Shard] = field(default_factory=deque)
    sent: deque[Shard] = field(default_factory=deque)
    quarantined: list[int] = field(default_factory=list)
    first_death: float | None = None

    def tokens(self, part: Shard) -> int:
        return sum(len(self.requests[index].token_ids) for index in part.indices)


class Dispatcher:
    """Shares batches between replicas.

    Args:
        kv_store: Store in which replicas note what they read.
        prefix: Names this group of replicas in the store.
        on_quarantine: Called with each sequence that is quarantined here and the number of scorers it killed alone.
        pause: Sleeps; replaced in tests.
    """

    def __init__(
        self,
        replicas: Sequence[ScorerReplica],
        teacher: TeacherConfig,
        kv_store: KvStore,
        prefix: str,
        on_quarantine: Callable[[ScoreRequest, int], None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._replicas = list(replicas)
        self._teacher = teacher
        self._kv_store, self._prefix = kv_store, prefix
        self._on_quarantine = on_quarantine
        self._pause = pause
        self._affinity = CacheAffinity()
        self._quarantined: set[str] = set()
        self._loads = [0] * len(self._replicas)
        self._queue: deque[ScoreCall] = deque()  # calls with shards that are not sent, in order
        self._lock = RLock()  # one thread may submit while another collects
        self._in_flight = 0
        self._deaths_in_a_row = 0
        self._suspects_in_a_row = 0

    def submit(self, requests: Sequence[ScoreRequest]) -> ScoreCall:
        """Starts reading a batch, as far as `max_in_flight` allows; the rest is sent as scores are taken."""
        call = ScoreCall(list(requests), [None] * len(requests))
        self._learn_quarantined()
        with self._lock:
            limit = self._teacher.max_num_batched_tokens
            calls = [cut(indices, call.requests, limit) for indices in self.shard(call.requests)]
            for turn in range(max(map(len, calls))):  # in turns, so that every replica starts at once
                call.waiting += [
                    Shard(parts[turn], replica) for replica, parts in enumerate(calls) if turn < len(parts)
                ]
            self._queue.append(call)
            self._fill()
        return call

    def shard(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        """Returns the indices of each replica's requests; the same sequence goes to the same replica ever after."""
        with self._lock:
            return shard(requests, self._affinity, len(self._replicas))

    def is_quarantined(self, request: ScoreRequest) -> bool:
        """Tells whether a sequence is known to kill the scorer that reads it."""
        return bool(self._quarantined) and request.name in self._quarantined

    def collect(self, call: ScoreCall) -> list[HiddenArray | None]:
        """Waits for the scores of a batch; None stands for a sequence that was quarantined.

        Raises:
            ProcessDiedError: Scorers died for longer than `retry_timeout_s`, are gone for good, or die whatever they
                read.
            WaitTimeoutError: A call took longer than `timeout_s`.
        """
        try:
            while True:
                with self._lock:
                    if not call.waiting and not call.sent:
                        break
                    if not call.sent and not self._send(call):  # one slot is kept free for the call that is waited for
                        continue
                    part = call.sent[0]
                try:
                    arrays = self._replicas[part.replica].get(part.reference)
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
            self._abandon(call)
            raise
        return call.results

    def _fill(self) -> None:
        while self._queue:
            if not self._queue[0].waiting:
                self._queue.popleft()  # also where nothing may be sent: a call holds its results
            elif self._in_flight < self._teacher.max_in_flight - 1:
                self._send(self._queue[0])
            else:
                break

    def _learn_quarantined(self) -> None:
        """Reads the store: another process, or another batch of this one, may have found a culprit meanwhile."""
        self._quarantined |= {key.rsplit("/", 1)[1] for key in self._kv_store.below(f"{self._prefix}/quarantined/")}

    def _send(self, call: ScoreCall) -> bool:
        """Sends the next shard of a call without its quarantined sequences; False where nothing of it was left."""
        part = call.waiting.popleft()
        known = [index for index in part.indices if self.is_quarantined(call.requests[index])]
        call.quarantined += known
        part.indices = [index for index in part.indices if index not in known]
        if not part.indices:
            return False
        part.attempt = uuid.uuid4().hex
        requests = [call.requests[index] for index in part.indices]
        part.reference = self._replicas[part.replica].send(requests, part.attempt)
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

    def _abandon(self, call: ScoreCall) -> None:
        """Frees the slots of a call whose scores nobody will take."""
        for part in list(call.sent):
            self._take_back(call, part)
        with self._lock:
            call.waiting.clear()

    def _learn(self, call: ScoreCall, part: Shard, error: ProcessDiedError) -> None:
        """Counts a death if this shard is to blame, and queues the shard to be sent again, whole or in halves."""
        now = time.monotonic()
        call.first_death = now if call.first_death is None else call.first_death
        if now - call.first_death > self._teacher.retry_timeout_s:
            error.remedy = (
                f"Scorers of this batch have been dying for {now - call.first_death:.0f} s "
                f"(teacher.retry_timeout_s). {error.remedy}"
            )
            raise error
        self._deaths_in_a_row += 1
        self._learn_quarantined()
        blamed = self._kv_store.read(f"{self._prefix}/reads/{self._replicas[part.replica].name}") == part.attempt
        part.deaths += blamed
        alone = len(part.indices) == 1
        if part.deaths >= (1 if part.proven and not alone else self._teacher.max_attempts):
            if alone:
                self._quarantine(call, part, error)
                return
            middle = len(part.indices) // 2
            halves = [
                Shard(indices, part.replica, proven=True) for indices in (part.indices[:middle], part.indices[middle:])
            ]
        else:
            halves = [part]
        longest = min(_FIRST_PAUSE_S * 2.0 ** (self._deaths_in_a_row - 1), _LONGEST_PAUSE_S)
        self._pause(longest * random.uniform(0.5, 1.0))  # so that clients do not all come back at the same moment
        with self._lock:
            for half in halves:
                half.replica = self._least_busy(error)
            call.waiting.extendleft(reversed(halves))

    def _quarantine(self, call: ScoreCall, part: Shard, error: ProcessDiedError) -> None:
        self._suspects_in_a_row += 1
        if self._suspects_in_a_row >= _SUSPECT_IN_A_ROW:
            error.remedy = f"It dies whatever it reads, so no sequence is to blame. {error.remedy}"
            raise error
        (index,) = part.indices
        request = call.requests[index]
        self._quarantined.add(request.name)
        self._kv_store.write(f"{self._prefix}/quarantined/{request.name}", str(part.deaths))
        call.quarantined.append(index)
        self._on_quarantine(request, part.deaths)

    def _least_busy(self, error: ProcessDiedError) -> int:
        alive = [index for index, replica in enumerate(self._replicas) if not replica.is_gone()]
        if not alive:
            raise error
        return min(alive, key=self._loads.__getitem__)
