"""Gradients of the loss, summed while its chunks are in hand, and handed to autograd at the end."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raycomplete.losses.heads import Head

# Memory of one part of a weight gradient on its way into the sum: small enough to stay in cache, large enough for the
# matrix product to run at its full rate.
_SLAB_BYTES = {"cpu": 2 * 2**20, "cuda": 32 * 2**20}


class GradientSums:
    """Gradients of one call in hidden states, weight and bias of the student, where those require grad."""

    def __init__(self, hidden_NH: Tensor, head: Head, dtype: torch.dtype) -> None:
        enabled = torch.is_grad_enabled()  # evaluation pays for no gradient, even where parameters require one
        weight_VH, bias_V = head.weight_VH.detach(), head.bias_V
        self._inputs = (hidden_NH, head.weight_VH, head.bias_V)
        self._head_weight_VH = weight_VH
        self._hidden_NH = torch.zeros_like(hidden_NH.detach()) if enabled and hidden_NH.requires_grad else None
        self._weight_VH = (
            torch.zeros_like(weight_VH, dtype=dtype, memory_format=torch.contiguous_format)
            if enabled and head.weight_VH.requires_grad
            else None
        )
        want_bias = enabled and bias_V is not None and bias_V.requires_grad
        self._bias_V = weight_VH.new_zeros(head.vocab_size, dtype=dtype) if want_bias else None

    @property
    def wanted(self) -> bool:
        """True where anything requires grad."""
        return any(item is not None for item in (self._hidden_NH, self._weight_VH, self._bias_V))

    def add(self, rows_C: Tensor, hidden_CH: Tensor, raw_CV: Tensor) -> None:
        """Takes in one chunk."""
        if self._hidden_NH is not None:
            self._hidden_NH[rows_C] = (raw_CV @ self._head_weight_VH).to(self._hidden_NH.dtype)
        if self._weight_VH is not None and self._weight_VH.dtype == raw_CV.dtype:
            self._weight_VH.addmm_(raw_CV.T, hidden_CH)
        elif self._weight_VH is not None and raw_CV.is_cuda and adds_in_float32(raw_CV.device, raw_CV.dtype):
            torch.addmm(self._weight_VH, raw_CV.T, hidden_CH, out_dtype=self._weight_VH.dtype, out=self._weight_VH)
        elif self._weight_VH is not None:
            self._add_weight_by_slabs(self._weight_VH, hidden_CH, raw_CV)
        if self._bias_V is not None:
            self._add_bias_by_slabs(self._bias_V, raw_CV)

    def _add_weight_by_slabs(self, weight_VH: Tensor, hidden_CH: Tensor, raw_CV: Tensor) -> None:
        """A product in lower precision than its sum, without a second tensor as large as the weight."""
        for slab in _slabs(weight_VH, weight_VH.shape[1]):
            raw_SC = raw_CV[:, slab].T
            if raw_CV.is_cuda:
                weight_VH[slab] += torch.mm(raw_SC, hidden_CH, out_dtype=weight_VH.dtype)
            else:  # CPU products know one dtype only
                weight_VH[slab] += torch.mm(raw_SC, hidden_CH)

    @staticmethod
    def _add_bias_by_slabs(bias_V: Tensor, raw_CV: Tensor) -> None:
        for slab in _slabs(bias_V, raw_CV.shape[0]):
            bias_V[slab] += raw_CV[:, slab].to(bias_V.dtype).sum(dim=0)

    def attach(self, total: Tensor) -> Tensor:
        """Makes the total a node of the autograd graph of the inputs; gives the sums away."""
        if not self.wanted:
            return total
        sums = (self._hidden_NH, self._weight_VH, self._bias_V)
        self._hidden_NH = self._weight_VH = self._bias_V = None
        attached: Tensor = _SavedGradients.apply(total, *sums, *self._inputs)  # type: ignore[no-untyped-call]
        return attached


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tries, once a process, whether this torch adds a product in lower precision to a float32 sum in place.

    That reads and writes the [V, H] sum once a chunk. A product first and a sum after it, by slabs, move it twice more.
    """
    ones = torch.ones(64, 64, dtype=dtype, device=device)
    total = torch.full((64, 64), 1.0 + 2.0**-12, device=device)  # which neither float16 nor bfloat16 holds
    expected = total + 64.0
    try:
        torch.addmm(total, ones.T, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # an older torch knows no such argument, or a device no such product
        return False
    return bool(torch.equal(total, expected))


def _slabs(values: Tensor, row_length: int) -> list[slice]:
    """Cuts the first dimension so that `row_length` values a row fill one slab."""
    budget = _SLAB_BYTES.get(values.device.type, _SLAB_BYTES["cpu"])
    rows = max(1, budget // (max(row_length, 1) * values.dtype.itemsize))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


class _SavedGradients(torch.autograd.Function):
    """Gives a scalar the gradients that were taken while it was computed.

    Saves those gradients only: under ZeRO-3 the head's weight is partitioned again by the time backward runs.

    Backward makes a second tensor of each, [V, H] among them, as scaling in place would spoil another backward through
    a retained graph. It scales in the gradient's own dtype, to which the factor is rounded first: exact for powers of
    two, within 2^-8 of the factor for any other in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        grad_hidden_NH: Tensor | None,
        grad_weight_VH: Tensor | None,
        grad_bias_V: Tensor | None,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return None, None, None, None, *scaled
