"""Checks on what comes into the core, so that a bad tensor is named where it enters and not where it explodes."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.core.heads import Head
from raycomplete.errors import NotFiniteError


def check_hidden(name: str, hidden_NH: Tensor, head: Head, num_rows: int) -> None:
    """Refuses hidden states that do not fit their head, or the other inputs.

    Raises:
        ValueError: The shape is not [num_rows, H of the head].
        NotFiniteError: The tensor holds NaN or infinity.
    """
    if tuple(hidden_NH.shape) != (num_rows, head.hidden_size):
        raise ValueError(
            f"{name} hidden must be [{num_rows}, {head.hidden_size}] (token rows, width of the {name} head), "
            f"got {list(hidden_NH.shape)}."
        )
    check_rows_finite(f"{name} hidden", hidden_NH)


def check_rows_finite(name: str, values: Tensor) -> None:
    """Refuses NaN and infinity in a tensor whose first dimension counts rows.

    Raises:
        NotFiniteError: Names the tensor and its first bad row.
    """
    bad_N = ~torch.isfinite(values.detach()).flatten(1).all(dim=1) if values.ndim > 1 else ~torch.isfinite(values)
    if bool(bad_N.any()):
        first, count = int(bad_N.int().argmax()), int(bad_N.sum())
        raise NotFiniteError(
            f"{name} holds NaN or infinity in {count} of {len(bad_N)} rows, first in row {first}.",
            "If it is the student's, lower train.lr; else check the checkpoint and dtype of that model.",
        )


def check_same_vocabulary(heads: dict[str, Head]) -> None:
    """Refuses heads over different vocabularies.

    Args:
        heads: Heads by the name of their model.

    Raises:
        ValueError: The vocabulary sizes differ.
    """
    sizes = {name: head.vocab_size for name, head in heads.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"The heads differ in vocabulary size ({listed}); drop padding rows with Head.rows().")
