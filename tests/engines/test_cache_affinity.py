"""Sharing a batch between replicas: everything once, even by tokens, the same sequence to the same replica."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raycomplete.engines.cache_affinity import CacheAffinity, cut, share
from raycomplete.engines.payload import ScoreRequest


def request(number: int, length: int) -> ScoreRequest:
    return ScoreRequest((number, *range(length - 1)), 1)


BATCHES = st.lists(st.tuples(st.integers(0, 15), st.integers(2, 60)), max_size=40).map(
    lambda pairs: [request(number, length) for number, length in pairs]
)


@given(batch=BATCHES, num_replicas=st.integers(1, 5))
def test_every_place_is_dealt_once_and_loads_differ_by_one_sequence_at_most(
    batch: list[ScoreRequest], num_replicas: int
) -> None:
    dealt = share(batch, CacheAffinity(), num_replicas)
    assert sorted(place for places in dealt for place in places) == list(range(len(batch)))
    assert all(places == sorted(places) for places in dealt)
    loads = [sum(len(item.token_ids) for item in {batch[place] for place in places}) for places in dealt]
    assert max(loads) - min(loads) <= max((len(item.token_ids) for item in batch), default=0)


@given(batch=BATCHES)
def test_a_sequence_goes_where_it_was_read_before(batch: list[ScoreRequest]) -> None:
    affinity = CacheAffinity()
    first = {batch[place]: replica for replica, places in enumerate(share(batch, affinity, 3)) for place in places}
    again = share(batch[::-1], affinity, 3)
    assert all(first[batch[::-1][place]] == replica for replica, places in enumerate(again) for place in places)


def test_the_oldest_homes_are_forgotten() -> None:
    affinity = CacheAffinity(capacity=2)
    for number in range(3):
        affinity.put(request(number, 3), number)
    assert [affinity.get(request(number, 3)) for number in range(3)] == [None, 1, 2]


def test_calls_are_cut_by_tokens_and_a_long_sequence_is_one_by_itself() -> None:
    batch = [request(index, length) for index, length in enumerate((4, 4, 4, 30, 2))]
    assert cut([0, 1, 2, 3, 4], batch, 8) == [[0, 1], [2], [3], [4]]
    assert cut([], batch, 8) == []
