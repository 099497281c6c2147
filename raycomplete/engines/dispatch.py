"""Sends batches to the replicas of a scorer, and gets every score that can be had whatever dies on the way.

Reading a sequence again gives the same scores, so a call whose scorer died is simply sent again, after a pause that
doubles, to the replica with the least to do. Only a call that was being read when its scorer died counts a death. A
batch that has killed `max_attempts` scorers is halved, each half that kills again is halved at once, and a sequence
that has killed `max_attempts` scorers alone is quarantined for good.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol

from raycomplete.config import TeacherConfig
from raycomplete.engines.cache_affinity import CacheAffinity, cut, share
from raycomplete.engines.kv_store import KvStore, digest
from raycomplete.engines.payload import HiddenArray, ScoreRequest
from raycomplete.runtime.errors import ProcessDiedError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SUSPECT_IN_A_ROW = 3  # sequences quarantined without one answer in between: then it is not the sequences' fault


class Replica(Protocol):
    """One scorer. Implemented by `raycomplete.engines.scorers.ScorerHandle`."""

    name: str

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        """Starts reading, and returns a reference."""

    def get(self, reference: Any) -> list[HiddenArray]:
        """Waits for the scores of a reference; raises ProcessDiedError where the scorer died."""

    def is_gone(self) -> bool:
        """Whether it died and nobody will start it again."""


@dataclass(eq=False)
class Part:
    """Sequences that one replica reads in one call.

    Attributes:
        places: Where they stand in their batch.
        replica: Which one reads them.
        deaths: Of scorers that were reading just this.
        proven: Whether it is half of something that has killed `max_attempts` scorers.
        attempt: Name of the present call.
        reference: Of the present call.
    """

    places: list[int]
    replica: int
    deaths: int = 0
    proven: bool = False
    attempt: str = ""
    reference: Any = None


@dataclass(eq=False)
class ScoreCall:
    """A batch under way.

    Attributes:
        requests: In the order of the results.
        results: None where there is no score yet.
        waiting: Parts that are not sent yet.
        sent: Parts that are, oldest first.
        quarantined: Places that will never have a score.
        first_death: When a scorer died over it first, seconds.
    """

    requests: list[ScoreRequest]
    results: list[HiddenArray | None]
    waiting: deque[Part] = field(default_factory=deque)
    sent: deque[Part] = field(default_factory=deque)
    quarantined: list[int] = field(default_factory=list)
    first_death: float | None = None


class Dispatcher:
    """Shares batches between replicas.

    Args:
        replicas: At least one.
        scoring: Bounds and limits.
        kv_store: Where replicas note what they read.
        prefix: Of this group of replicas on the kv_store.
        on_quarantine: Told each sequence that is quarantined here, and how many scorers it killed alone.
        pause: Sleeps; replaced in tests.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        scoring: TeacherConfig,
        kv_store: KvStore,
        prefix: str,
        on_quarantine: Callable[[ScoreRequest, int], None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._replicas = list(replicas)
        self._scoring = scoring
        self._kv_store, self._prefix = kv_store, prefix
        self._on_quarantine = on_quarantine
        self._pause = pause
        self._affinity = CacheAffinity()
        self._aside: set[str] = set()
        self._loads = [0] * len(self._replicas)
        self._queue: deque[ScoreCall] = deque()  # calls with parts that are not sent, in order
        self._lock = RLock()  # one thread may submit while another collects
        self._in_flight = 0
        self._deaths_in_a_row = 0
        self._suspects_in_a_row = 0

    def submit(self, requests: Sequence[ScoreRequest]) -> ScoreCall:
        """Starts reading a batch, as far as `max_in_flight` allows; the rest is sent as scores are taken."""
        call = ScoreCall(list(requests), [None] * len(requests))
        self._learn_set_aside()
        with self._lock:
            limit = self._scoring.max_num_batched_tokens
            calls = [cut(places, call.requests, limit) for places in self.deal(call.requests)]
            for turn in range(max(map(len, calls))):  # in turns, so that every replica starts at once
                call.waiting += [Part(parts[turn], replica) for replica, parts in enumerate(calls) if turn < len(parts)]
            self._queue.append(call)
            self._fill()
        return call

    def deal(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        """The places of each replica's requests; the same sequence goes to the same replica ever after."""
        with self._lock:
            return share(requests, self._affinity, len(self._replicas))

    def is_quarantined(self, request: ScoreRequest) -> bool:
        """Whether a sequence is known to kill whoever reads it."""
        return bool(self._aside) and digest(request) in self._aside

    def collect(self, call: ScoreCall) -> list[HiddenArray | None]:
        """Waits for the scores of a batch; None stands for a sequence that was quarantined.

        Raises:
            ProcessDiedError: Scorers died for longer than `retry_timeout_s`, are gone for good, or die whatever they
                read.
            WaitTimeoutError: A call took longer than `timeout_s`.
        """
        try:
            while call.waiting or call.sent:
                with self._lock:
                    if not call.sent and not self._send(call):  # one place is kept free for who is waited for
                        continue
                    part = call.sent[0]
                try:
                    arrays = self._replicas[part.replica].get(part.reference)
                except ProcessDiedError as error:
                    self._take_back(call, part)
                    self._learn(call, part, error)
                    continue
                self._take_back(call, part)
                for place, array in zip(part.places, arrays, strict=True):
                    call.results[place] = array
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
            elif self._in_flight < self._scoring.max_in_flight - 1:
                self._send(self._queue[0])
            else:
                break

    def _learn_set_aside(self) -> None:
        """Another process, or another batch of this one, may have found a culprit meanwhile."""
        self._aside |= {key.rsplit("/", 1)[1] for key in self._kv_store.below(f"{self._prefix}/aside/")}

    def _send(self, call: ScoreCall) -> bool:
        """Sends the next part of a call without what was quarantined; False where nothing of it was left."""
        part = call.waiting.popleft()
        known = [place for place in part.places if self.is_quarantined(call.requests[place])]
        call.quarantined += known
        part.places = [place for place in part.places if place not in known]
        if not part.places:
            return False
        part.attempt = uuid.uuid4().hex
        requests = [call.requests[place] for place in part.places]
        part.reference = self._replicas[part.replica].send(requests, part.attempt)
        call.sent.append(part)
        self._in_flight += 1
        self._loads[part.replica] += self._tokens(call, part)
        return True

    def _take_back(self, call: ScoreCall, part: Part) -> None:
        with self._lock:
            call.sent.remove(part)
            part.reference = None
            self._in_flight -= 1
            self._loads[part.replica] -= self._tokens(call, part)

    def _abandon(self, call: ScoreCall) -> None:
        """Nobody will take what is under way: its places in flight are free again."""
        for part in list(call.sent):
            self._take_back(call, part)
        with self._lock:
            call.waiting.clear()

    def _learn(self, call: ScoreCall, part: Part, error: ProcessDiedError) -> None:
        """After a death: counts it if this part is to blame, and lets the part be sent again, whole or in halves."""
        now = time.monotonic()
        call.first_death = now if call.first_death is None else call.first_death
        if now - call.first_death > self._scoring.retry_timeout_s:
            error.remedy = (
                f"Scorers of this batch have been dying for {now - call.first_death:.0f} s "
                f"(teacher.retry_timeout_s). {error.remedy}"
            )
            raise error
        self._deaths_in_a_row += 1
        self._learn_set_aside()
        blamed = self._kv_store.read(f"{self._prefix}/reads/{self._replicas[part.replica].name}") == part.attempt
        part.deaths += blamed
        alone = len(part.places) == 1
        if part.deaths >= (1 if part.proven and not alone else self._scoring.max_attempts):
            if alone:
                self._set_aside(call, part, error)
                return
            middle = len(part.places) // 2
            halves = [
                Part(places, part.replica, proven=True) for places in (part.places[:middle], part.places[middle:])
            ]
        else:
            halves = [part]
        longest = min(_FIRST_PAUSE_S * 2.0 ** (self._deaths_in_a_row - 1), _LONGEST_PAUSE_S)
        self._pause(longest * random.uniform(0.5, 1.0))  # not all clients at the same moment
        with self._lock:
            for half in halves:
                half.replica = self._least_busy(error)
            call.waiting.extendleft(reversed(halves))

    def _set_aside(self, call: ScoreCall, part: Part, error: ProcessDiedError) -> None:
        self._suspects_in_a_row += 1
        if self._suspects_in_a_row >= _SUSPECT_IN_A_ROW:
            error.remedy = f"It dies whatever it reads, so no sequence is to blame. {error.remedy}"
            raise error
        (place,) = part.places
        request = call.requests[place]
        self._aside.add(digest(request))
        self._kv_store.write(f"{self._prefix}/aside/{digest(request)}", str(part.deaths))
        call.quarantined.append(place)
        self._on_quarantine(request, part.deaths)

    def _least_busy(self, error: ProcessDiedError) -> int:
        there = [index for index, replica in enumerate(self._replicas) if not replica.is_gone()]
        if not there:
            raise error
        return min(there, key=self._loads.__getitem__)

    @staticmethod
    def _tokens(call: ScoreCall, part: Part) -> int:
        return sum(len(call.requests[place].token_ids) for place in part.places)
