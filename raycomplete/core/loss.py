"""The completion loss: anchor, recovery and penalty in one pass, without [N, V] logits in memory.

Rows are walked in chunks. While the logits of a chunk are in hand its gradients are taken analytically and folded into
[N, H] and [V, H] buffers, so peak memory is O(N*H + V*H + chunk*V) and backward only scales what was saved. The
formulas are ours, not those of arXiv 2511.12155; `loss_reference` states them plainly.

Letters: N token rows, C rows of one chunk, P rows that need base (inputs) or penalty rows (`LossOutput`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raycomplete.core.base_favored import base_favored_mask, deficit, forward_kl, trained_depth
from raycomplete.core.checks import check_hidden, check_rows_finite, check_same_vocabulary
from raycomplete.core.heads import Head
from raycomplete.core.loss_types import LossOutput, LossSettings, TokenKind, needs_base
from raycomplete.core.teacher import contrastive_log_probs

__all__ = ["LossOutput", "LossSettings", "TokenKind", "completion_loss", "needs_base"]


def completion_loss(
    student_hidden_NH: Tensor,
    student_head: Head,
    aligned_hidden_NH: Tensor,
    aligned_head: Head,
    base_hidden_PH: Tensor | None,
    base_head: Head | None,
    kind_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
) -> LossOutput:
    """Weighted sum of KL(q || p_s) on anchor and recovery rows and g_t * sum over B_t of p_s(v)^2 on penalty rows.

    Differentiable once, in the student's hidden states and in weight and bias of its head, where those require grad.
    B_t, g_t and q come from frozen models and carry no gradient. Under ZeRO-3 the head must be gathered around this
    call; backward does not read it. H may differ between the three models.

    Args:
        student_hidden_NH: Final hidden states of the student [N, H].
        student_head: Its head; bfloat16, float32 or float64.
        aligned_hidden_NH: Final hidden states of the aligned model in the teacher's context [N, H].
        aligned_head: Its head.
        base_hidden_PH: Final hidden states of base on the rows of `needs_base`, in order [P, H]; may be None if P is 0.
        base_head: Its head; may be None if P is 0.
        kind_N: `TokenKind` of each row [N], integers.
        weight_N: Weight of each row [N].
        settings: Weights of the parts and the constants of the formulas.

    Returns:
        The loss in float32 (float64 for a float64 student head), with its parts and per-row measurements.

    Raises:
        ValueError: Shapes, vocabularies, kinds or the student's dtype do not fit.
        NotFiniteError: An input holds NaN or infinity, or a row's loss came out so; names it and the first bad row.
    """
    base_row_N = _check_inputs(
        student_hidden_NH,
        student_head,
        aligned_hidden_NH,
        aligned_head,
        base_hidden_PH,
        base_head,
        kind_N,
        weight_N,
        settings,
    )
    device, dtype = student_hidden_NH.device, student_head.logits_dtype
    kind_N, base_row_N = kind_N.to(device), base_row_N.to(device)
    weight_N = weight_N.detach().to(device, dtype)
    factor_N = weight_N * settings.part_weight(kind_N, dtype)

    with torch.autocast(device.type, enabled=False):  # dtypes are those of the heads, not of an outer autocast
        walk = _Walk(student_hidden_NH, student_head, int((kind_N == TokenKind.PENALTY).sum()), factor_N)
        with torch.no_grad():
            teacher = _Teacher(aligned_hidden_NH, aligned_head, base_hidden_PH, base_head, base_row_N, settings)
            for rows_C in _chunks((kind_N != TokenKind.PENALTY).nonzero().flatten(), settings.chunk_tokens):
                walk.divergence(rows_C, teacher.target(rows_C))
            first = 0
            for rows_C in _chunks((kind_N == TokenKind.PENALTY).nonzero().flatten(), settings.chunk_tokens):
                walk.penalty(rows_C, slice(first, first + len(rows_C)), *teacher.both(rows_C), settings)
                first += len(rows_C)
            check_rows_finite("the loss of the student", walk.row_loss_N)
            weighted_N = weight_N * walk.row_loss_N
            total = (factor_N * walk.row_loss_N).sum()
        total = walk.attach(total, student_hidden_NH, student_head)

    return LossOutput(
        total=total,
        anchor=weighted_N[kind_N == TokenKind.ANCHOR].sum(),
        recovery=weighted_N[kind_N == TokenKind.RECOVERY].sum(),
        penalty=weighted_N[kind_N == TokenKind.PENALTY].sum(),
        row_loss_N=walk.row_loss_N,
        base_favored_mass_P=walk.base_favored_mass_P,
        trained_depth_P=walk.trained_depth_P,
        deficit_P=walk.deficit_P,
        student_mass_P=walk.student_mass_P,
    )


class _Teacher:
    """Log-probabilities of the frozen models at given rows."""

    def __init__(
        self,
        aligned_hidden_NH: Tensor,
        aligned_head: Head,
        base_hidden_PH: Tensor | None,
        base_head: Head | None,
        base_row_N: Tensor,
        settings: LossSettings,
    ) -> None:
        self.aligned_hidden_NH, self.aligned_head = aligned_hidden_NH, aligned_head
        self.base_hidden_PH, self.base_head, self.base_row_N = base_hidden_PH, base_head, base_row_N
        self.settings = settings

    def aligned(self, rows_C: Tensor) -> Tensor:
        """log p_a [C, V]."""
        return self.aligned_head.logits(self.aligned_hidden_NH[rows_C]).log_softmax(dim=-1)

    def both(self, rows_C: Tensor) -> tuple[Tensor, Tensor]:
        """log p_a and log p_b [C, V] each."""
        assert self.base_hidden_PH is not None
        assert self.base_head is not None
        base_hidden_CH = self.base_hidden_PH[self.base_row_N[rows_C]]
        return self.aligned(rows_C), self.base_head.logits(base_hidden_CH).log_softmax(dim=-1)

    def target(self, rows_C: Tensor) -> Tensor:
        """log q [C, V]."""
        if self.settings.alpha == 0:
            return self.aligned(rows_C)
        return contrastive_log_probs(*self.both(rows_C), self.settings.alpha, self.settings.plausibility)


class _Walk:
    """The student's side of the walk: row losses, measurements and gradient buffers.

    Gradients with respect to logits z of a row: KL(q || p_s) gives p_s - q; with S = sum over B_t of p_s(v)^2,
    g_t * S gives 2 g_t p_s(v) (p_s(v) [v in B_t] - S). Both are then multiplied by the row's factor.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, num_penalty: int, factor_N: Tensor) -> None:
        enabled = torch.is_grad_enabled()  # evaluation pays for no gradient, even where parameters require one
        want_bias = enabled and head.bias_V is not None and head.bias_V.requires_grad
        self.hidden_NH, self.head, self.factor_N = hidden_NH.detach(), head.detach(), factor_N
        self.row_loss_N = torch.zeros_like(factor_N)
        self.base_favored_mass_P = factor_N.new_zeros(num_penalty)
        self.trained_depth_P = factor_N.new_zeros(num_penalty)
        self.deficit_P = factor_N.new_zeros(num_penalty)
        self.student_mass_P = factor_N.new_zeros(num_penalty)
        weight_VH, dtype = self.head.weight_VH, factor_N.dtype
        self.grad_hidden_NH = torch.zeros_like(self.hidden_NH) if enabled and hidden_NH.requires_grad else None
        # Summed over chunks in at least float32: bfloat16 sums stop growing after a few hundred like terms.
        self.grad_weight_VH = (
            torch.zeros_like(weight_VH, dtype=dtype) if enabled and head.weight_VH.requires_grad else None
        )
        self.grad_bias_V = weight_VH.new_zeros(head.vocab_size, dtype=dtype) if want_bias else None

    @property
    def wants_gradient(self) -> bool:
        return any(item is not None for item in (self.grad_hidden_NH, self.grad_weight_VH, self.grad_bias_V))

    def divergence(self, rows_C: Tensor, log_target_CV: Tensor) -> None:
        """KL(q || p_s) at anchor and recovery rows."""
        logits_CV = self.head.logits(self.hidden_NH[rows_C])
        log_target_CV = log_target_CV.to(logits_CV.dtype)
        log_student_CV = logits_CV.log_softmax(dim=-1)
        self.row_loss_N[rows_C] = forward_kl(log_target_CV, log_student_CV)
        if self.wants_gradient:
            grad_CV = log_student_CV.exp_().sub_(log_target_CV.exp())
            self._fold(rows_C, logits_CV, grad_CV.mul_(self.factor_N[rows_C, None]))

    def penalty(
        self, rows_C: Tensor, slots: slice, log_aligned_CV: Tensor, log_base_CV: Tensor, settings: LossSettings
    ) -> None:
        """g_t * sum over B_t of p_s(v)^2 at penalty rows; `slots` is where they stand among the P penalty rows."""
        favored_CV = base_favored_mask(log_aligned_CV, log_base_CV, settings.tau)
        self.trained_depth_P[slots] = trained_depth(log_aligned_CV, log_base_CV).to(self.factor_N.dtype)
        self.deficit_P[slots] = deficit(self.trained_depth_P[slots], settings.kappa)
        self.base_favored_mass_P[slots] = (log_base_CV.exp() * favored_CV).sum(dim=-1).to(self.factor_N.dtype)

        logits_CV = self.head.logits(self.hidden_NH[rows_C])
        student_CV = logits_CV.softmax(dim=-1)
        student_favored_CV = student_CV * favored_CV
        square_C1 = student_favored_CV.square().sum(dim=-1, keepdim=True)
        self.student_mass_P[slots] = student_favored_CV.sum(dim=-1)
        self.row_loss_N[rows_C] = self.deficit_P[slots] * square_C1[:, 0]
        if self.wants_gradient:
            factor_C = 2.0 * self.deficit_P[slots] * self.factor_N[rows_C]
            grad_CV = student_favored_CV.sub_(square_C1).mul_(student_CV)
            self._fold(rows_C, logits_CV, grad_CV.mul_(factor_C[:, None]))

    def _fold(self, rows_C: Tensor, logits_CV: Tensor, grad_CV: Tensor) -> None:
        """Carries the gradient of a chunk from its logits to hidden states, weight and bias."""
        raw_CV = self.head.raw_gradient_(logits_CV, grad_CV)
        if self.grad_bias_V is not None:
            self.grad_bias_V += raw_CV.sum(dim=0)
        weight_VH = self.head.weight_VH
        raw_CV = raw_CV.to(weight_VH.dtype)
        if self.grad_hidden_NH is not None:
            self.grad_hidden_NH[rows_C] = (raw_CV @ weight_VH).to(self.grad_hidden_NH.dtype)
        if self.grad_weight_VH is not None:
            hidden_CH = self.hidden_NH[rows_C].to(weight_VH.dtype)
            if self.grad_weight_VH.dtype == weight_VH.dtype:
                self.grad_weight_VH.addmm_(raw_CV.T, hidden_CH)  # spares a [V, H] temporary
            else:
                self.grad_weight_VH += raw_CV.T @ hidden_CH

    def attach(self, total: Tensor, hidden_NH: Tensor, head: Head) -> Tensor:
        """The total as a node of the autograd graph of the inputs."""
        if not self.wants_gradient:
            return total
        grads = (self.grad_hidden_NH, self.grad_weight_VH, self.grad_bias_V)
        inputs = (hidden_NH, head.weight_VH, head.bias_V)
        attached: Tensor = _SavedGradients.apply(total, *grads, *inputs)  # type: ignore[no-untyped-call]
        return attached


class _SavedGradients(torch.autograd.Function):
    """Gives a scalar the gradients that were taken while it was computed.

    Saves those gradients only: under ZeRO-3 the head's weight is partitioned again by the time backward runs.
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


def _chunks(rows_N: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows_N), size):
        yield rows_N[start : start + size]


def _check_inputs(
    student_hidden_NH: Tensor,
    student_head: Head,
    aligned_hidden_NH: Tensor,
    aligned_head: Head,
    base_hidden_PH: Tensor | None,
    base_head: Head | None,
    kind_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
) -> Tensor:
    """Refuses what does not fit; returns the row of `base_hidden_PH` that belongs to each token row [N]."""
    num_rows = student_hidden_NH.shape[0]
    for name, values in (("kind", kind_N), ("weight", weight_N)):
        if tuple(values.shape) != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}], one a token row, got {list(values.shape)}.")
    if kind_N.is_floating_point() or (num_rows and not 0 <= int(kind_N.min()) <= int(kind_N.max()) <= 2):
        raise ValueError("kind must hold the integers of TokenKind: 0 anchor, 1 recovery, 2 penalty.")
    if student_head.weight_VH.dtype == torch.float16:
        raise ValueError("A float16 student head underflows in the loss; use bfloat16 or float32.")
    check_rows_finite("weight", weight_N)
    check_hidden("student", student_hidden_NH, student_head, num_rows)
    check_hidden("aligned", aligned_hidden_NH, aligned_head, num_rows)
    needed_N = needs_base(kind_N, settings)
    num_base = int(needed_N.sum())
    heads = {"student": student_head, "aligned": aligned_head}
    if num_base:
        if base_hidden_PH is None or base_head is None:
            raise ValueError(f"{num_base} rows need base (see needs_base), but base_hidden_PH or base_head is None.")
        check_hidden("base", base_hidden_PH, base_head, num_base)
        heads["base"] = base_head
    check_same_vocabulary(heads)
    return needed_N.cumsum(0) - 1
