"""Hidden states as arrays of the same bits; a cache of bounded size."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raycomplete.engines.score_cache import HiddenArray, ScoreCache, ScoreRequest, to_array, to_tensor


def request(first: int, num_rows: int = 2) -> ScoreRequest:
    return ScoreRequest((first, 50, *range(60, 60 + num_rows)), 2)


def scores(value: int, num_rows: int = 2) -> HiddenArray:
    return np.full((num_rows, 8), value, dtype=np.uint16)


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    cache = ScoreCache(3 * scores(0).nbytes)
    assert cache.get(request(9)) is None
    for first in (1, 2, 3, 3, 3):  # the same scores again take no more memory
        cache.put(request(first), scores(first))
    found = cache.get(request(1))  # used again, so 2 is now the oldest
    assert found is not None
    assert np.array_equal(found, scores(1))
    assert (cache.hits, cache.misses) == (1, 1)
    cache.put(request(4), scores(4))
    assert [first for first in (1, 2, 3, 4) if cache.get(request(first)) is not None] == [1, 3, 4]
    assert cache.get(ScoreRequest(request(4).token_ids, 1)) is None, "the same tokens split elsewhere"
    cache.put(request(5, 6), scores(5, 6))  # as large as three
    assert [first for first in (1, 3, 4, 5) if cache.get(request(first, 6 if first == 5 else 2)) is not None] == [5]
    nothing = ScoreCache(0)
    nothing.put(request(1), scores(1))
    assert nothing.get(request(1)) is None


def test_arrays_keep_every_bit() -> None:
    """All 65,536 bit patterns of bfloat16, NaNs among them; and a tensor that is neither contiguous nor a leaf."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    hidden_TH = bits.view(torch.bfloat16).reshape(256, 256)
    back_TH = to_tensor(pickle.loads(pickle.dumps(to_array(hidden_TH))))
    assert back_TH.dtype == torch.bfloat16
    assert torch.equal(back_TH.view(torch.int16), hidden_TH.view(torch.int16))
    hidden_TH = torch.tensor([[1.0, -0.0, 1e-45], [float("nan"), float("-inf"), 1 / 3]])
    assert to_array(hidden_TH).dtype == np.float32
    assert torch.equal(to_tensor(to_array(hidden_TH)).view(torch.int32), hidden_TH.view(torch.int32))
    part_TH = (torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True) * 1).T[1:, ::2]
    assert torch.equal(to_tensor(to_array(part_TH)), part_TH.detach())


def test_the_tensor_shares_no_memory_with_a_read_only_array() -> None:
    array = to_array(torch.ones(2, 3, dtype=torch.bfloat16))
    array.setflags(write=False)  # as the object store hands it out
    to_tensor(array).zero_()
    assert (to_tensor(array) == 1).all()


@pytest.mark.parametrize(("tokens", "num_prompt"), [((1, 2), 0), ((1, 2), 2), ((1, 2), 3), ((1, 2), -1), ((), 0)])
def test_a_request_needs_a_prompt_and_a_response(tokens: tuple[int, ...], num_prompt: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_prompt} prompt tokens of {len(tokens)}"):
        ScoreRequest(tokens, num_prompt)
    assert ScoreRequest((5, 6, 7, 8, 9), 2).num_rows == 3
