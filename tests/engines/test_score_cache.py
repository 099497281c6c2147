"""Hidden states as arrays of the same bits; a cache of bounded size."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raycomplete.engines.score_cache import HiddenArray, ScoreCache, ScoreRequest, to_array, to_tensor

H = 8
ROOMY = 2**20


def request(first: int, num_rows: int = 2) -> ScoreRequest:
    return ScoreRequest((first, 50, *range(60, 60 + num_rows)), 2)


def scores(value: int, num_rows: int = 2) -> HiddenArray:
    return np.full((num_rows, H), value, dtype=np.uint16)


def test_scores_come_back_and_hits_are_counted() -> None:
    cache = ScoreCache(ROOMY)
    assert cache.get(request(1)) is None
    cache.put(request(1), scores(7))
    found = cache.get(request(1))
    assert found is not None
    assert np.array_equal(found, scores(7))
    assert cache.get(request(2)) is None
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_same_tokens_split_elsewhere_are_another_entry() -> None:
    cache = ScoreCache(ROOMY)
    cache.put(ScoreRequest((1, 2, 3, 4), 2), scores(7))
    assert cache.get(ScoreRequest((1, 2, 3, 4), 1)) is None


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    size = scores(0).nbytes
    cache = ScoreCache(3 * size)
    for first in (1, 2, 3):
        cache.put(request(first), scores(first))
    cache.get(request(1))  # used again, so 2 is now the oldest
    cache.put(request(4), scores(4))
    assert [first for first in (1, 2, 3, 4) if cache.get(request(first)) is not None] == [1, 3, 4]
    cache.put(request(5, 6), scores(5, 6))  # as large as three
    assert [first for first in (1, 3, 4) if cache.get(request(first)) is not None] == []
    assert cache.get(request(5, 6)) is not None


def test_putting_the_same_scores_again_takes_no_more_memory() -> None:
    cache = ScoreCache(2 * scores(0).nbytes)
    cache.put(request(1), scores(1))
    for _ in range(5):
        cache.put(request(2), scores(2))
    assert cache.get(request(1)) is not None


def test_without_memory_nothing_is_kept() -> None:
    cache = ScoreCache(0)
    cache.put(request(1), scores(1))
    assert cache.get(request(1)) is None


def every_bfloat16() -> torch.Tensor:
    """All 65,536 bit patterns: infinities, subnormals, signed zeros and every NaN among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).reshape(256, 256)


def test_bfloat16_keeps_every_bit() -> None:
    hidden_TH = every_bfloat16()
    array = to_array(hidden_TH)
    assert array.dtype == np.uint16
    back_TH = to_tensor(pickle.loads(pickle.dumps(array)))
    assert back_TH.dtype == torch.bfloat16
    assert torch.equal(back_TH.view(torch.int16), hidden_TH.view(torch.int16))


def test_float32_keeps_every_bit() -> None:
    hidden_TH = torch.tensor([[1.0, -0.0, 1e-45], [float("nan"), float("-inf"), 1 / 3]])
    array = to_array(hidden_TH)
    assert array.dtype == np.float32
    assert torch.equal(to_tensor(array).view(torch.int32), hidden_TH.view(torch.int32))


def test_slices_of_a_graph_travel_too() -> None:
    hidden_TH = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    part_TH = (hidden_TH * 1).T[1:, ::2]  # neither contiguous nor a leaf
    assert torch.equal(to_tensor(to_array(part_TH)), part_TH.detach())


def test_the_tensor_shares_no_memory_with_a_read_only_array() -> None:
    array = to_array(torch.ones(2, 3, dtype=torch.bfloat16))
    array.setflags(write=False)  # as the object store hands it out
    tensor = to_tensor(array)
    tensor.zero_()
    assert (to_tensor(array) == 1).all()


def test_a_request_counts_its_response_rows() -> None:
    request = ScoreRequest((5, 6, 7, 8, 9), 2)
    assert request.num_rows == 3
    assert request == ScoreRequest((5, 6, 7, 8, 9), 2)
    assert len({request, ScoreRequest((5, 6, 7, 8, 9), 2), ScoreRequest((5, 6, 7, 8, 9), 3)}) == 2


@pytest.mark.parametrize(("tokens", "num_prompt"), [((1, 2), 0), ((1, 2), 2), ((1, 2), 3), ((1, 2), -1), ((), 0)])
def test_a_request_needs_a_prompt_and_a_response(tokens: tuple[int, ...], num_prompt: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_prompt} prompt tokens of {len(tokens)}"):
        ScoreRequest(tokens, num_prompt)
