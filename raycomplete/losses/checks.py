"""Checks on what comes into the core, so that a bad tensor is named where it enters and not where it explodes."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossSettings, needs_base
from raycomplete.runtime.errors import NotFiniteError


def check_hidden(name: str, hidden_NH: Tensor, head: Head, num_rows: int, *, must_be_finite: bool = True) -> None:
    """Refuses hidden states that do not fit their head, or the other inputs.

    Raises:
        ValueError: The shape is not [num_rows, H of the head].
        NotFiniteError: The tensor holds NaN or infinity, and must not.
    """
    if tuple(hidden_NH.shape) != (num_rows, head.hidden_size):
        raise ValueError(
            f"{name} hidden must be [{num_rows}, {head.hidden_size}] (token rows, width of the {name} head), "
            f"got {list(hidden_NH.shape)}."
        )
    if must_be_finite:
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


def check_loss_inputs(
    student_hidden_NH: Tensor,
    student_head: Head,
    aligned_hidden_NH: Tensor,
    aligned_head: Head,
    base_hidden_PH: Tensor | None,
    base_head: Head | None,
    kind_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
    *,
    must_be_finite: bool = True,
) -> None:
    """Refuses arguments of `distillation_loss` that do not fit together.

    Raises:
        ValueError: Shapes, vocabularies, kinds or the student's dtype do not fit.
        NotFiniteError: A weight, or a hidden state that must be finite, is not; names the input and the first bad row.
    """
    num_rows = student_hidden_NH.shape[0]
    for name, values in (("kind", kind_N), ("weight", weight_N)):
        if tuple(values.shape) != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}], one a token row, got {list(values.shape)}.")
    if kind_N.is_floating_point() or (num_rows and not 0 <= int(kind_N.min()) <= int(kind_N.max()) <= 2):
        raise ValueError("kind must hold the integers of TokenKind: 0 anchor, 1 recovery, 2 penalty.")
    if student_head.weight_VH.dtype == torch.float16:
        raise ValueError("A float16 student head underflows in the loss; use bfloat16 or float32.")
    check_rows_finite("weight", weight_N)
    check_hidden("student", student_hidden_NH, student_head, num_rows, must_be_finite=must_be_finite)
    check_hidden("aligned", aligned_hidden_NH, aligned_head, num_rows, must_be_finite=must_be_finite)
    num_base = int(needs_base(kind_N, settings).sum())
    heads = {"student": student_head, "aligned": aligned_head}
    if num_base:
        if base_hidden_PH is None or base_head is None:
            raise ValueError(f"{num_base} rows need base (see needs_base), but base_hidden_PH or base_head is None.")
        check_hidden("base", base_hidden_PH, base_head, num_base, must_be_finite=must_be_finite)
        heads["base"] = base_head
    check_same_vocabulary(heads)
