"""Logits from hidden states."""

from __future__ import annotations

import pytest
import torch

from raycomplete.losses import Head


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def test_order_of_bias_scale_and_softcap():
    head = Head(torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]), scale=0.5, softcap=2.0)
    logits = head.logits(torch.tensor([[3.0]]))
    expected = 2 * torch.tanh(torch.tensor([[0.5 * (2 * 3 + 1), 0.5 * -3]]) / 2)
    assert torch.allclose(logits, expected)


@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [torch.float64, torch.float32, torch.bfloat16])
def test_product_in_the_dtype_of_the_weight_and_the_rest_in_float32(weight, hidden):
    head = Head(normal(7, 3, dtype=weight), normal(7, dtype=torch.float32), scale=0.3)
    hidden_NH = normal(4, 3, dtype=hidden)
    logits = head.logits(hidden_NH)
    above = torch.float64 if weight == torch.float64 else torch.float32
    product = (hidden_NH.to(weight) @ head.weight_VH.T).to(above)
    assert logits.dtype == above == head.logits_dtype
    assert torch.equal(logits, (product + head.bias_V.to(above)) * 0.3)


@pytest.mark.parametrize("settings", [{}, {"scale": 2.0}, {"softcap": 1.5}, {"scale": 0.5, "softcap": 1.0}])
def test_gradients(settings):
    inputs = [item.requires_grad_() for item in (normal(4, 3), normal(6, 3), normal(6))]
    assert torch.autograd.gradcheck(lambda hidden, weight, bias: Head(weight, bias, **settings).logits(hidden), inputs)


def test_rows_drop_padding_and_let_gradients_through():
    weight_VH, bias_V = normal(6, 3).requires_grad_(), normal(6).requires_grad_()
    head = Head(weight_VH, bias_V, scale=0.5, softcap=3.0)
    kept = head.rows(4)
    assert (kept.vocab_size, kept.hidden_size, kept.scale, kept.softcap) == (4, 3, 0.5, 3.0)
    assert torch.equal(kept.logits(normal(2, 3)), head.logits(normal(2, 3))[:, :4])
    kept.logits(normal(2, 3)).sum().backward()
    assert weight_VH.grad[:4].all()
    assert not weight_VH.grad[4:].any()
    assert not bias_V.grad[4:].any()
    assert head.rows(6) is head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_VH": torch.empty(0)}, "ZeRO-3"),
        ({"weight_VH": torch.zeros(4, 2), "bias_V": torch.zeros(3)}, r"\[4\]"),
        ({"weight_VH": torch.zeros(4, 2), "softcap": 0.0}, "softcap"),
    ],
)
def test_what_cannot_be_a_head_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(**arguments)
