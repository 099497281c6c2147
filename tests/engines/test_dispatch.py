"""Batches whose scorers die: every score in order, only the culprits quarantined, and shares even by tokens."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.engines import scorers
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scorers import Dispatcher, KvStore, ScorerReplica, TeacherClient, cut
from raycomplete.runtime.errors import ProcessDiedError


class Notes(KvStore):
    """A key-value store in memory."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def write(self, key: str, value: str) -> None:
        self.notes[key] = value

    def read(self, key: str) -> str:
        return self.notes.get(key, "")

    def below(self, prefix: str) -> list[str]:
        return [key for key in self.notes if key.startswith(prefix)]


class Reader(ScorerReplica):
    """Stands for a scorer: reads calls in order, dies of deadly first tokens or at numbered calls, with its queue."""

    def __init__(self, name: str, notes: Notes, deadly: set[int], accidents: set[int], *, gone: bool = False) -> None:
        super().__init__(name, None)
        self._notes, self._deadly, self._accidents, self._gone = notes, deadly, accidents, gone
        self._queue: list[dict[str, Any]] = []
        self.calls = self.deaths = 0

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        self._queue.append({"requests": requests, "attempt": attempt})
        return self._queue[-1]

    def wait(self, reference: Any, what: str = "", timeout_s: float = 0.0) -> Any:
        while "result" not in reference:
            self._work()
        if reference["result"] is None:
            raise ProcessDiedError(f"The {self.name} died.")
        return reference["result"]

    def is_gone(self) -> bool:
        return self._gone

    def _work(self) -> None:
        call = self._queue.pop(0)
        self.calls += 1
        self._notes.write(f"group/reads/{self.name}", call["attempt"])
        tokens = {request.token_ids[0] for request in call["requests"]}
        if self._gone or self.calls in self._accidents or tokens & self._deadly:
            self.deaths += 1
            for lost in (call, *self._queue):
                lost["result"] = None
            self._queue = []
            return
        self._notes.write(f"group/reads/{self.name}", "")
        call["result"] = [np.asarray(request.token_ids, np.float32)[:, None] for request in call["requests"]]


def batch_of(count: int) -> list[ScoreRequest]:
    return [ScoreRequest((number, *range(number % 5 + 2)), 1) for number in range(count)]


def dispatcher(readers: list[Reader], notes: Notes, quarantined: list[int], **limits: int) -> Dispatcher:
    def note(item: ScoreRequest, deaths: int) -> None:
        quarantined.append(item.token_ids[0])

    return Dispatcher(readers, 64, notes, "group", note, pause=lambda _: None, **limits)


@given(
    count=st.integers(1, 60),
    deadly=st.sets(st.integers(0, 59), max_size=2),
    accidents=st.sets(st.integers(1, 8), max_size=2),
    replicas=st.integers(1, 3),
    max_in_flight=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_only_deadly_sequences_are_quarantined_and_all_others_are_scored_in_order(
    count: int, deadly: set[int], accidents: set[int], replicas: int, max_in_flight: int
) -> None:
    notes, quarantined = Notes(), list[int]()
    readers = [Reader(f"scorer {number}", notes, deadly, accidents) for number in range(replicas)]
    one = dispatcher(readers, notes, quarantined, max_in_flight=max_in_flight)
    batches = [batch_of(count), batch_of(count // 2)]
    calls = [one.submit(batch) for batch in batches]
    for batch, call in zip(batches, calls, strict=True):
        for request, array in zip(batch, one.collect(call), strict=True):
            assert (array is None) == (request.token_ids[0] in deadly)
            assert array is None or array[:, 0].tolist() == list(request.token_ids)
    assert sorted(set(quarantined)) == sorted(deadly & set(range(count)))
    other = dispatcher(readers, notes, quarantined)  # of another process: it sends no known culprit
    deaths, call = sum(reader.deaths for reader in readers), other.submit(batches[0])
    assert [index for index, array in enumerate(other.collect(call)) if array is None] == sorted(call.quarantined)
    assert sum(reader.deaths for reader in readers) <= deaths + len(accidents) * replicas
    assert one._in_flight == 0
    assert one._loads == [0] * replicas
    assert not any(call.waiting for call in one._queue)


def test_one_culprit_costs_few_scorers() -> None:
    notes, quarantined = Notes(), list[int]()
    reader = Reader("scorer", notes, {11}, set())
    one = dispatcher([reader], notes, quarantined)
    one.collect(one.submit([ScoreRequest((number, 1), 1) for number in range(32)]))  # one call of 64 tokens
    assert quarantined == [11]
    assert reader.deaths == 3 + int(math.log2(32) - 1) + 3  # the batch, its halves once each, the culprit alone


@pytest.mark.parametrize("max_in_flight", [1, 2, 5])
def test_no_more_calls_are_in_flight_than_allowed(max_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, most = Notes(), list[int]()
    readers = [Reader(f"scorer {number}", notes, set(), set()) for number in range(2)]
    one = dispatcher(readers, notes, [], max_in_flight=max_in_flight)
    send = Reader.send

    def counted(self: Reader, requests: list[ScoreRequest], attempt: str) -> Any:
        most.append(one._in_flight + 1)
        return send(self, requests, attempt)

    monkeypatch.setattr(Reader, "send", counted)
    calls = [one.submit(batch_of(80)) for _ in range(3)]
    for call in reversed(calls):  # the last one first: nobody takes what the others have in flight
        assert all(array is not None for array in one.collect(call))
    assert max(most) == max_in_flight


def test_what_is_quarantined_is_not_read_ahead_either() -> None:
    actor = MagicMock()
    client = TeacherClient("base", [ScorerReplica("base scorer", actor)], 64, "group")
    client._dispatcher._quarantined.add(ScoreRequest((2, 3), 1).name)
    client.warm_sequences([((1, 2), 1), ((2, 3), 1)])
    actor.warm.options.return_value.remote.assert_called_once_with([ScoreRequest((1, 2), 1)])


def test_dying_without_a_culprit_or_for_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, quarantined = Notes(), list[int]()
    one = dispatcher([Reader("scorer", notes, set(range(8)), set())], notes, quarantined)
    with pytest.raises(ProcessDiedError, match="dies whatever it reads"):
        one.collect(one.submit(batch_of(8)))
    assert one._in_flight == 0
    monkeypatch.setattr(scorers, "RETRY_TIMEOUT_S", 1e-9)
    one = dispatcher([Reader("scorer", notes, set(), set(range(99)))], notes, [])
    with pytest.raises(ProcessDiedError, match="have been dying for 0 s"):
        one.collect(one.submit(batch_of(3)))


def test_others_take_over_from_a_replica_that_is_gone_and_the_last_one_is_missed() -> None:
    notes, quarantined = Notes(), list[int]()
    readers = [Reader("first", notes, set(), set(), gone=True), Reader("second", notes, set(), set())]
    one = dispatcher(readers, notes, quarantined)
    assert all(array is not None for array in one.collect(one.submit(batch_of(30))))
    assert quarantined == []
    alone = dispatcher(readers[:1], notes, quarantined)
    with pytest.raises(ProcessDiedError, match="The first died"):
        alone.collect(alone.submit(batch_of(3)))


def test_a_client_crosses_to_another_process_with_nothing_under_way(tmp_path: Path) -> None:
    client = TeacherClient("base", [ScorerReplica("base scorer", None)], 64, "group", tmp_path)
    client._dispatcher._in_flight = 3
    other = pickle.loads(pickle.dumps(client))
    assert (other.role, other._prefix, other._record_folder) == ("base", "group", tmp_path)
    assert other._dispatcher._in_flight == 0
    assert [replica.name for replica in other._replicas] == ["base scorer"]


def request(number: int, length: int) -> ScoreRequest:
    return ScoreRequest((number, *range(length - 1)), 1)


BATCHES = st.lists(st.tuples(st.integers(0, 15), st.integers(2, 60)), max_size=40).map(
    lambda pairs: [request(number, length) for number, length in pairs]
)


@given(batch=BATCHES, num_replicas=st.integers(1, 5))
def test_shards_are_even_by_tokens_and_a_sequence_returns_to_its_reader(
    batch: list[ScoreRequest], num_replicas: int
) -> None:
    one = dispatcher([Reader("scorer", Notes(), set(), set())] * num_replicas, Notes(), [])
    shards = one.shard(batch)
    assert sorted(index for indices in shards for index in indices) == list(range(len(batch)))
    assert all(indices == sorted(indices) for indices in shards)
    loads = [sum(len(item.token_ids) for item in {batch[index] for index in indices}) for indices in shards]
    assert max(loads) - min(loads) <= max((len(item.token_ids) for item in batch), default=0)
    first = {batch[index]: replica for replica, indices in enumerate(shards) for index in indices}
    again = one.shard(batch[::-1])
    assert all(first[batch[::-1][index]] == replica for replica, indices in enumerate(again) for index in indices)


def test_calls_are_cut_by_tokens_and_a_long_sequence_is_one_by_itself() -> None:
    batch = [request(index, length) for index, length in enumerate((4, 4, 4, 30, 2))]
    assert cut([0, 1, 2, 3, 4], batch, 8) == [[0, 1], [2], [3], [4]]
    assert cut([], batch, 8) == []
