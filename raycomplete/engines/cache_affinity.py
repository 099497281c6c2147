"""How a batch is shared between the replicas of a scorer: evenly by tokens, what a replica has read before to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from raycomplete.engines.payload import ScoreRequest


class CacheAffinity:
    """Which replica read a sequence before, so that it finds the scores in that one's cache.

    Args:
        capacity: Sequences that are remembered, the oldest forgotten first: on-policy, most are never seen again.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._found: OrderedDict[int, int] = OrderedDict()  # by hash: a mix-up costs one more reading

    def get(self, request: ScoreRequest) -> int | None:
        """The replica, or None where it is not known."""
        return self._found.get(hash(request))

    def put(self, request: ScoreRequest, replica: int) -> None:
        """Remembers it."""
        self._found[hash(request)] = replica
        if len(self._found) > self._capacity:
            self._found.popitem(last=False)


def share(requests: Sequence[ScoreRequest], affinity: CacheAffinity, num_replicas: int) -> list[list[int]]:
    """Deals requests to replicas: longest first, each to the replica with the fewest tokens so far.

    Args:
        requests: One batch.
        affinity: Sequences that go where they were read before, and where the others are entered.
        num_replicas: At least 1.

    Returns:
        For each replica the places of its requests, in the order of the batch.
    """
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [0] * num_replicas
    taken: dict[ScoreRequest, int] = {}  # a sequence that stands twice in the batch is read once
    for place in sorted(range(len(requests)), key=lambda index: -len(requests[index].token_ids)):
        request = requests[place]
        if request not in taken:
            home = affinity.get(request)
            taken[request] = min(range(num_replicas), key=loads.__getitem__) if home is None else home
            loads[taken[request]] += len(request.token_ids)
            affinity.put(request, taken[request])
        dealt[taken[request]].append(place)
    return [sorted(places) for places in dealt]


def cut(places: Sequence[int], requests: Sequence[ScoreRequest], max_tokens: int) -> list[list[int]]:
    """Cuts one replica's share into calls of at most `max_tokens`; a longer sequence is a call by itself."""
    calls: list[list[int]] = []
    filled = 0
    for place in places:
        tokens = len(requests[place].token_ids)
        if not calls or filled + tokens > max_tokens:
            calls.append([])
            filled = 0
        calls[-1].append(place)
        filled += tokens
    return calls
