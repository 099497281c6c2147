"""Output heads of models, and the final hidden states that they turn into logits.

Teachers send hidden states (H numbers a token) rather than logits (V numbers), so each model needs its head beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from raycomplete.runtime.errors import NotFiniteError


@dataclass(frozen=True, eq=False)
class Head:
    """The output head of one model: logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap).

    Attributes:
        weight_VH: Output embedding [V, H], tied or not; its dtype is the dtype of the matrix product.
        bias_V: Bias [V], or None.
        scale: Factor on the logits; 1 / `logits_scaling` for models that divide.
        softcap: Bound on |logit|, or None for no bound.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight_VH.ndim != 2:
            raise ValueError(
                f"A head weight must be [V, H], got shape {list(self.weight_VH.shape)}; under ZeRO-3 gather it first."
            )
        if self.bias_V is not None and self.bias_V.shape != self.weight_VH.shape[:1]:
            raise ValueError(f"A head bias must be [{self.vocab_size}], got shape {list(self.bias_V.shape)}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"A softcap must be positive, or None for no bound, got {self.softcap}.")

    @property
    def vocab_size(self) -> int:
        """V, padding rows included unless `rows` dropped them."""
        return self.weight_VH.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden states."""
        return self.weight_VH.shape[1]

    @property
    def logits_dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 weight."""
        return torch.promote_types(self.weight_VH.dtype, torch.float32)

    def rows(self, vocab_size: int) -> Head:
        """The first `vocab_size` rows of the head, without padding: a view, so gradients reach the whole weight."""
        if not 1 <= vocab_size <= self.vocab_size:
            raise ValueError(f"Cannot keep {vocab_size} rows of a head with {self.vocab_size}.")
        if vocab_size == self.vocab_size:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VH=self.weight_VH[:vocab_size], bias_V=bias_V)

    def detach(self) -> Head:
        """The same head outside the autograd graph, sharing its storage."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Computes logits [N, V] of hidden states [N, H], differentiable in those, weight and bias.

        The product runs in the weight's dtype, as in the model itself, whatever autocast says; everything after it
        runs in at least float32, because softcap and softmax lose too much in bfloat16.
        """
        return self.logits_of_product(self.product(hidden_NH))

    def product(self, hidden_NH: Tensor) -> Tensor:
        """Computes the matrix product of `logits` alone, [N, V] in the weight's dtype."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return hidden_NH.to(self.weight_VH.dtype) @ self.weight_VH.T

    def logits_of_product(self, product_NV: Tensor) -> Tensor:
        """Adds bias, scale and softcap to a product, which gives `logits` [N, V] in `logits_dtype`.

        Where nothing is to be done, the result is the product itself, not a copy.
        """
        with torch.autocast(product_NV.device.type, enabled=False):
            raw_NV = product_NV.to(self.logits_dtype)
            if self.bias_V is not None:
                raw_NV = raw_NV + self.bias_V.to(self.logits_dtype)
            logits_NV = raw_NV if self.scale == 1.0 else raw_NV * self.scale
            if self.softcap is not None:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
            return logits_NV

    def raw_gradient_(self, logits_NV: Tensor, grad_NV: Tensor) -> Tensor:
        """Carries a gradient from logits, as `logits` returned them, back to hidden @ weight^T + bias [N, V].

        Overwrites it on the way, to spare a [N, V] copy.
        """
        if self.softcap is not None:
            tanh_NV = logits_NV / self.softcap
            grad_NV.mul_(tanh_NV.square_().neg_().add_(1.0))  # d tanh(u) / du = 1 - tanh(u)^2
        return grad_NV if self.scale == 1.0 else grad_NV.mul_(self.scale)


class HiddenStates(NamedTuple):
    """Final hidden states of one model, after its final norm [rows, H], and its head."""

    hidden_NH: Tensor
    head: Head


def check_hidden(name: str, hidden_NH: Tensor, head: Head, num_rows: int, *, must_be_finite: bool = True) -> None:
    """Refuses hidden states that do not fit their head, or the other inputs."""
    if tuple(hidden_NH.shape) != (num_rows, head.hidden_size):
        raise ValueError(
            f"{name} hidden must be [{num_rows}, {head.hidden_size}] (token rows, width of the {name} head), "
            f"got {list(hidden_NH.shape)}."
        )
    if must_be_finite:
        check_rows_finite(f"{name} hidden", hidden_NH)


def check_rows_finite(name: str, values: Tensor) -> None:
    """Refuses NaN and infinity in a tensor whose first dimension counts rows."""
    bad_N = ~torch.isfinite(values.detach()).flatten(1).all(dim=1) if values.ndim > 1 else ~torch.isfinite(values)
    if bool(bad_N.any()):
        first, count = int(bad_N.int().argmax()), int(bad_N.sum())
        raise NotFiniteError(
            f"{name} holds NaN or infinity in {count} of {len(bad_N)} rows, first in row {first}.",
            "If it is the student's, lower train.lr; else check the checkpoint and dtype of that model.",
        )


def check_same_vocabulary(heads: Mapping[str, Head]) -> None:
    """Refuses heads, by the name of their model, over different vocabularies."""
    sizes = {name: head.vocab_size for name, head in heads.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"The heads differ in vocabulary size ({listed}); drop padding rows with Head.rows().")
