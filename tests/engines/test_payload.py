"""Hidden states as arrays: the same bits on both sides."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raycomplete.engines.payload import ScoreRequest, to_array, to_tensor


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
