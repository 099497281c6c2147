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

from raycomplete.config import TeacherConfig
from raycomplete.engines.dispatch import CacheAffinity, Dispatcher, KvStore, ScorerReplica, cut, shard
from raycomplete.engines.score_cache import HiddenArray, ScoreRequest
from raycomplete.engines.scorers import TeacherClient
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

    def clear(self, prefix: str) -> None:
        self.notes = {key: value for key, value in self.notes.items() if not key.startswith(prefix)}


class Reader(ScorerReplica):
    """Stands for a scorer: reads calls in order, dies of deadly sequences, and takes all that is queued with it.

    Args:
        name: Of the replica.
        notes: Where it says what it reads.
        deadly: First tokens of the sequences that kill it.
        accidents: Numbers of calls, over all its lives, that it dies in whatever they hold.
        gone: Whether it never comes back.
    """

    def __init__(self, name: str, notes: Notes, deadly: set[int], accidents: set[int], *, gone: bool = False) -> None:
        self.name, self._notes, self._deadly, self._accidents, self._gone = name, notes, deadly, accidents, gone
        self._queue: list[dict[str, Any]] = []
        self.calls = self.deaths = self.outstanding = self.most_outstanding = 0

    def send(self, requests: list[ScoreRequest], attempt: str) -> Any:
        call: dict[str, Any] = {"requests": requests, "attempt": attempt}
        self._queue.append(call)
        return call

    def get(self, reference: Any) -> list[HiddenArray]:
        while "result" not in reference:
            self._work()
        if reference["result"] is None:
            raise ProcessDiedError(f"The {self.name} died.")
        found: list[HiddenArray] = reference["result"]
        return found

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


def dispatcher(readers: list[Reader], notes: Notes, quarantined: list[int], **scoring: Any) -> Dispatcher:
    config = TeacherConfig(max_num_batched_tokens=64, **scoring)
    return Dispatcher(
        readers, config, notes, "group", lambda item, _: quarantined.append(item.token_ids[0]), pause=lambda _: None
    )


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
            if request.token_ids[0] in deadly:
                assert array is None
            else:
                assert array is not None
                assert array[:, 0].tolist() == list(request.token_ids)
    assert sorted(set(quarantined)) == sorted(deadly & set(range(count)))
    assert [array for array in one.collect(one.submit(batches[0])) if array is None] == [None] * len(set(quarantined))
    assert one._in_flight == 0
    assert one._loads == [0] * replicas


def test_one_culprit_costs_few_scorers() -> None:
    notes, quarantined = Notes(), list[int]()
    reader = Reader("scorer", notes, {11}, set())
    one = dispatcher([reader], notes, quarantined, max_attempts=3)
    one.collect(one.submit([ScoreRequest((number, 1), 1) for number in range(32)]))  # one call of 64 tokens
    assert quarantined == [11]
    assert reader.deaths == 3 + int(math.log2(32) - 1) + 3  # the batch, its halves once each, the culprit alone


def test_a_sequence_that_is_known_is_never_sent_again() -> None:
    notes, quarantined = Notes(), list[int]()
    reader = Reader("scorer", notes, {2}, set())
    dispatcher([reader], notes, quarantined).collect(dispatcher([reader], notes, quarantined).submit(batch_of(4)))
    deaths = reader.deaths
    other = dispatcher([reader], notes, quarantined)  # of another process
    call = other.submit(batch_of(4))
    assert [index for index, array in enumerate(other.collect(call)) if array is None] == call.quarantined == [2]
    assert (reader.deaths, quarantined) == (deaths, [2])


@pytest.mark.parametrize("max_in_flight", [1, 2, 5])
def test_no_more_calls_are_in_flight_than_allowed(max_in_flight: int) -> None:
    notes = Notes()
    readers = [Reader(f"scorer {number}", notes, set(), set()) for number in range(2)]
    one = dispatcher(readers, notes, [], max_in_flight=max_in_flight)
    most = 0

    def watch(reader: Reader) -> None:
        send = reader.send

        def counted(requests: list[ScoreRequest], attempt: str) -> Any:
            nonlocal most
            most = max(most, one._in_flight + 1)
            return send(requests, attempt)

        reader.send = counted  # type: ignore[method-assign]

    for reader in readers:
        watch(reader)
    calls = [one.submit(batch_of(80)) for _ in range(3)]
    for call in reversed(calls):  # the last one first: nobody takes what the others have in flight
        assert all(array is not None for array in one.collect(call))
    assert most == max_in_flight


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_what_is_collected_is_not_kept(max_in_flight: int) -> None:
    notes = Notes()
    one = dispatcher([Reader("scorer", notes, set(), set())], notes, [], max_in_flight=max_in_flight)
    for _ in range(3):
        one.collect(one.submit(batch_of(20)))
    assert not one._queue


def test_what_is_quarantined_is_not_read_ahead_either() -> None:
    actor = MagicMock()
    client = TeacherClient("base", [ScorerReplica("base scorer", actor, 5.0)], TeacherConfig(), "group")
    client._dispatcher._quarantined.add(ScoreRequest((2, 3), 1).name)
    client.warm_sequences([((1, 2), 1), ((2, 3), 1)])
    actor.warm.options.return_value.remote.assert_called_once_with([ScoreRequest((1, 2), 1)])


def test_a_scorer_that_dies_whatever_it_reads_is_not_the_sequences_fault() -> None:
    notes, quarantined = Notes(), list[int]()
    one = dispatcher([Reader("scorer", notes, set(range(8)), set())], notes, quarantined)
    with pytest.raises(ProcessDiedError, match="dies whatever it reads"):
        one.collect(one.submit(batch_of(8)))
    assert one._in_flight == 0


def test_dying_for_too_long_ends_the_wait_and_says_for_how_long() -> None:
    notes = Notes()
    one = dispatcher([Reader("scorer", notes, set(), set(range(99)))], notes, [], retry_timeout_s=1e-9)
    with pytest.raises(ProcessDiedError, match=r"have been dying for 0 s \(teacher\.retry_timeout_s\)"):
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
    client = TeacherClient("base", [ScorerReplica("base scorer", None, 5.0)], TeacherConfig(), "group", tmp_path)
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
def test_every_index_is_in_one_shard_and_loads_differ_by_one_sequence_at_most(
    batch: list[ScoreRequest], num_replicas: int
) -> None:
    shards = shard(batch, CacheAffinity(), num_replicas)
    assert sorted(index for indices in shards for index in indices) == list(range(len(batch)))
    assert all(indices == sorted(indices) for indices in shards)
    loads = [sum(len(item.token_ids) for item in {batch[index] for index in indices}) for indices in shards]
    assert max(loads) - min(loads) <= max((len(item.token_ids) for item in batch), default=0)


@given(batch=BATCHES)
def test_a_sequence_goes_where_it_was_read_before(batch: list[ScoreRequest]) -> None:
    affinity = CacheAffinity()
    first = {batch[index]: replica for replica, indices in enumerate(shard(batch, affinity, 3)) for index in indices}
    again = shard(batch[::-1], affinity, 3)
    assert all(first[batch[::-1][index]] == replica for replica, indices in enumerate(again) for index in indices)


def test_the_oldest_sequences_are_forgotten() -> None:
    affinity = CacheAffinity(capacity=2)
    for number in range(3):
        affinity.put(request(number, 3), number)
    assert [affinity.get(request(number, 3)) for number in range(3)] == [None, 1, 2]


def test_calls_are_cut_by_tokens_and_a_long_sequence_is_one_by_itself() -> None:
    batch = [request(index, length) for index, length in enumerate((4, 4, 4, 30, 2))]
    assert cut([0, 1, 2, 3, 4], batch, 8) == [[0, 1], [2], [3], [4]]
    assert cut([], batch, 8) == []
