"""The walk over token rows in chunks: matrix products on the way in, matrix products of the gradient on the way out.

Rows are sorted by kind, so that each chunk is at most three runs of one kind, and base is multiplied for its rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raycomplete.losses.backends import choose_backend
from raycomplete.losses.chunks import even_chunks, rows_per_chunk
from raycomplete.losses.gradients import GradientSums
from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossSettings, TokenKind, needs_base
from raycomplete.losses.torch_rows import PenaltyRows, RowLogits, RowLosses

_SLAB_ROWS = 2048  # of a head that is converted piece by piece


class Source(NamedTuple):
    """A model's hidden states [rows, H] and its head."""

    hidden_NH: Tensor
    head: Head


@dataclass(frozen=True, eq=False)
class Walked:
    """What a walk leaves behind.

    Attributes:
        row_loss_N: Unweighted loss of each row [N].
        penalty: Measurements of penalty rows, in their order among the N.
        gradients: Sums of the gradients of factor * row loss.
    """

    row_loss_N: Tensor
    penalty: PenaltyRows
    gradients: GradientSums


def walk(
    student: Source, aligned: Source, base: Source | None, kind_N: Tensor, factor_N: Tensor, settings: LossSettings
) -> Walked:
    """Row losses of all rows, and the gradient of their sum times factor.

    Args:
        student: The student; gradients are summed where its tensors require them.
        aligned: The aligned model.
        base: Base on the rows of `needs_base`, in order; None where there are none.
        kind_N: `TokenKind` of each row [N].
        factor_N: Weight of each row's gradient [N], in the dtype that losses take.
        settings: Constants of the formulas.
    """
    gradients = GradientSums(student.hidden_NH, student.head, factor_N.dtype)
    with torch.no_grad():
        walker = _Walker(student, aligned, base, kind_N, factor_N, settings, gradients)
        for rows in walker.chunks:
            walker.take(rows)
        row_loss_N = torch.empty_like(factor_N)
        row_loss_N[walker.order_N] = walker.row_loss_N
        return Walked(row_loss_N, PenaltyRows.join(walker.penalty), gradients)


class _Walker:
    """Buffers of one walk. Rows are counted in sorted order here; `order_N` leads back."""

    def __init__(
        self,
        student: Source,
        aligned: Source,
        base: Source | None,
        kind_N: Tensor,
        factor_N: Tensor,
        settings: LossSettings,
        gradients: GradientSums,
    ) -> None:
        self.student = Source(student.hidden_NH.detach(), student.head.detach())
        self.aligned, self.base, self.settings, self.gradients = aligned, base, settings, gradients
        self.order_N = kind_N.argsort(stable=True)
        self.factor_N = factor_N[self.order_N]
        needed_N = needs_base(kind_N, settings)
        self.base_row_N = (needed_N.cumsum(0) - 1)[self.order_N]
        counts = [int((kind_N == kind).sum()) for kind in TokenKind]
        self.ends = [sum(counts[: kind + 1]) for kind in TokenKind]
        num_rows = len(kind_N)
        self.first_base_row = 0 if settings.alpha > 0 else self.ends[TokenKind.RECOVERY]
        self.row_loss_N = torch.empty_like(self.factor_N)
        self.penalty = [PenaltyRows.none(self.factor_N, settings.top_tokens)]

        head, dtype = self.student.head, self._logits_dtype(student.head)
        limit = rows_per_chunk(settings.chunk_tokens, head.vocab_size, dtype, factor_N.device)
        self.chunks = even_chunks(num_rows, limit)
        size = max((rows.stop - rows.start for rows in self.chunks), default=0)
        self.student_CV = self._buffer(size, head)
        self.aligned_CV = self._buffer(size, aligned.head)
        self.base_CV = None if base is None else self._buffer(min(size, num_rows - self.first_base_row), base.head)
        self.gradient_CV = self._gradient_buffer(head)
        self.backend: RowLosses = choose_backend(
            head, aligned.head, None if base is None else base.head, settings, max_rows=size
        )

    def _logits_dtype(self, head: Head) -> torch.dtype:
        return head.logits_dtype if self.settings.logits_dtype == "float32" else head.weight_VH.dtype

    def _buffer(self, rows: int, head: Head) -> Tensor:
        return self.factor_N.new_empty(rows, head.vocab_size, dtype=self._logits_dtype(head))

    def _gradient_buffer(self, head: Head) -> Tensor | None:
        """In the dtype of the products of the gradient: the student's own logits where they have it."""
        if not self.gradients.wanted:
            return None
        if self.student_CV.dtype == head.weight_VH.dtype:
            return self.student_CV
        return torch.empty_like(self.student_CV, dtype=head.weight_VH.dtype)

    def take(self, rows: slice) -> None:
        """Losses, measurements and gradients of one chunk."""
        index_C = self.order_N[rows]
        hidden_CH = self.student.hidden_NH[index_C].to(self.student.head.weight_VH.dtype)
        _product(hidden_CH, self.student.head, self.student_CV)
        _product(self.aligned.hidden_NH[index_C], self.aligned.head, self.aligned_CV)
        base_start = max(rows.start, self.first_base_row)
        if self.base is not None and base_start < rows.stop:
            assert self.base_CV is not None
            base_row_C = self.base_row_N[base_start : rows.stop]
            _product(self.base.hidden_NH[base_row_C], self.base.head, self.base_CV)
        start = rows.start
        for kind in TokenKind:
            stop = min(self.ends[kind], rows.stop)
            if start < stop:
                self._run(kind, slice(start, stop), self._logits(slice(start, stop), rows.start, base_start))
                start = stop
        if self.gradient_CV is not None:
            self.gradients.add(index_C, hidden_CH, self.gradient_CV[: len(index_C)])

    def _logits(self, rows: slice, first: int, first_base: int) -> RowLogits:
        """Rows of the buffers, whose first rows are `first` and `first_base`."""
        inside = slice(rows.start - first, rows.stop - first)
        with_base = self.base_CV is not None and rows.start >= first_base
        return RowLogits(
            self.student_CV[inside],
            self.aligned_CV[inside],
            self.base_CV[rows.start - first_base : rows.stop - first_base]
            if self.base_CV is not None and with_base
            else None,
            None if self.gradient_CV is None else self.gradient_CV[inside],
        )

    def _run(self, kind: TokenKind, rows: slice, logits: RowLogits) -> None:
        if kind == TokenKind.PENALTY:
            measured = self.backend.penalty(logits, self.factor_N[rows])
            # Where B_t is empty the loss is 0 whatever the student, but NaN of the student is in its gradient.
            broken_P = measured.aligned_student_kl_P.isnan()
            self.row_loss_N[rows] = measured.loss_P.masked_fill(broken_P, torch.nan)
            self.penalty.append(measured)
        else:
            divergence = self.settings.divergence(kind)
            self.row_loss_N[rows] = self.backend.divergence(logits, divergence, self.factor_N[rows])


def _product(hidden_CH: Tensor, head: Head, out_CV: Tensor) -> None:
    """hidden @ weight^T into the first rows of a buffer, multiplied in the weight's dtype, summed in float32."""
    weight_VH, out_CV = head.weight_VH, out_CV[: len(hidden_CH)]
    hidden_CH = hidden_CH.to(weight_VH.dtype)
    if out_CV.dtype == weight_VH.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    elif out_CV.is_cuda:
        torch.mm(hidden_CH, weight_VH.T, out_dtype=out_CV.dtype, out=out_CV)
    else:  # CPU products know one dtype only
        hidden_CH = hidden_CH.to(out_CV.dtype)
        for start in range(0, len(weight_VH), _SLAB_ROWS):
            slab = slice(start, start + _SLAB_ROWS)
            out_CV[:, slab] = hidden_CH @ weight_VH[slab].to(out_CV.dtype).T
