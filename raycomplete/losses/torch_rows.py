"""Loss, measurements and gradient of token rows whose logits are in hand, in PyTorch on any device.

Rows are worked through in blocks that stay in cache, in buffers that are made once: from float32 copies of the matrix
products to a gradient that is written where the student's product stood. `kernels` does the same on CUDA.

Letters: C rows of one call, R rows of one block, F base-favored (row, token) pairs, K top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from raycomplete.config.training import Divergence
from raycomplete.losses.base_favored import deficit
from raycomplete.losses.contrastive import contrastive_log_probs
from raycomplete.losses.divergences import FORMULAS, normalise_, row_dot
from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossSettings

_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}  # of one buffer; on a CPU all five stay near the core


@dataclass(frozen=True, eq=False)
class RowLogits:
    """Matrix products hidden @ weight^T of some rows; whoever computes the rows' losses may overwrite them.

    Attributes:
        student_CV: The student's [C, V].
        aligned_CV: The aligned model's [C, V].
        base_CV: Base's [C, V], or None where the rows do not need it.
        gradient_CV: Where the gradient with respect to hidden @ weight^T + bias goes [C, V]; may share memory with
            `student_CV`; None where no gradient is wanted.
    """

    student_CV: Tensor
    aligned_CV: Tensor
    base_CV: Tensor | None
    gradient_CV: Tensor | None

    def rows(self, rows: slice) -> RowLogits:
        """Some of the rows, as views."""
        parts = (getattr(self, field.name) for field in fields(self))
        return RowLogits(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class PenaltyRows:
    """What `LossOutput` reports of penalty rows, under the same names; `loss_P` is their row loss."""

    loss_P: Tensor
    base_favored_mass_P: Tensor
    alignment_kl_P: Tensor
    deficit_P: Tensor
    student_mass_P: Tensor
    aligned_student_kl_P: Tensor
    top_token_PK: Tensor
    top_mass_PK: Tensor

    @classmethod
    def none(cls, like_N: Tensor, top_tokens: int) -> PenaltyRows:
        """No rows, in dtype and on device of `like_N`."""
        top = [like_N.new_empty(0, top_tokens, dtype=torch.long), like_N.new_empty(0, top_tokens)]
        return cls(*[like_N.new_empty(0) for _ in range(len(fields(cls)) - len(top))], *top)

    @classmethod
    def join(cls, parts: list[PenaltyRows]) -> PenaltyRows:
        """Rows of all parts in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class RowLosses(Protocol):
    """A backend: the loss of rows whose logits are in hand. Every call may overwrite them."""

    def divergence(self, logits: RowLogits, divergence: Divergence, factor_C: Tensor) -> Tensor:
        """T^2 D(q, p_s) [C]; writes `factor` times its gradient."""

    def penalty(self, logits: RowLogits, factor_C: Tensor) -> PenaltyRows:
        """g_t * sum over B_t of p_s(v)^2 with its measurements; writes `factor` times its gradient."""


class TorchRows:
    """The PyTorch backend.

    Args:
        student: Head of the student.
        aligned: Head of the aligned model.
        base: Head of base, or None where no row needs it.
        settings: Constants of the formulas.
        max_rows: Most rows of one call.
    """

    def __init__(self, student: Head, aligned: Head, base: Head | None, settings: LossSettings, max_rows: int) -> None:
        self.student, self.aligned, self.base, self.settings = student, aligned, base, settings
        heads = [head for head in (student, aligned, base) if head is not None]
        self.excludes = settings.alpha > 0 or any(_excludes_tokens(head) for head in heads)
        weight_VH, dtype = student.weight_VH, student.logits_dtype
        budget = _BLOCK_BYTES.get(weight_VH.device.type, _BLOCK_BYTES["cpu"])
        self.block_rows = max(1, min(max_rows, budget // (student.vocab_size * dtype.itemsize)))
        self.buffers = [weight_VH.new_empty(self.block_rows, student.vocab_size, dtype=dtype) for _ in range(5)]

    def divergence(self, logits: RowLogits, divergence: Divergence, factor_C: Tensor) -> Tensor:
        """See `RowLosses`."""
        temperature = self.settings.temperature
        loss_C = torch.empty_like(factor_C)
        for rows, part, (first, second, student_work, target_work, _) in self._blocks(logits, len(factor_C)):
            student_RV, shift_R1 = _read(part.student_CV, self.student, temperature, first)
            target_RV = self._target(part, second)
            loss_R1 = FORMULAS[divergence](student_RV, target_RV, student_work, target_work, self.excludes)
            loss_C[rows] = loss_R1[:, 0] * temperature**2
            # T^2 of the loss, 1 / T of the chain rule
            student_work.mul_(temperature * factor_C[rows, None])
            self._write(student_work, student_RV, shift_R1, temperature, part.gradient_CV)
        return loss_C

    def penalty(self, logits: RowLogits, factor_C: Tensor) -> PenaltyRows:
        """See `RowLosses`."""
        parts = [PenaltyRows.none(factor_C, self.settings.top_tokens)]
        for rows, part, buffers in self._blocks(logits, len(factor_C)):
            parts.append(self._penalty_block(part, factor_C[rows], buffers))
        return PenaltyRows.join(parts)

    def _blocks(self, logits: RowLogits, num_rows: int) -> Iterator[tuple[slice, RowLogits, list[Tensor]]]:
        for start in range(0, num_rows, self.block_rows):
            rows = slice(start, min(start + self.block_rows, num_rows))
            yield rows, logits.rows(rows), [buffer[: rows.stop - start] for buffer in self.buffers]

    def _target(self, part: RowLogits, work_RV: Tensor) -> Tensor:
        """Logits of q [R, V], the largest of a row 0."""
        aligned_RV, _ = _read(part.aligned_CV, self.aligned, self.settings.temperature, work_RV)
        if self.settings.alpha == 0:
            return aligned_RV
        assert part.base_CV is not None
        assert self.base is not None
        base_RV, _ = _read(part.base_CV, self.base, self.settings.temperature, self.buffers[4][: len(work_RV)])
        log_aligned_RV, log_base_RV = aligned_RV.log_softmax(dim=-1), base_RV.log_softmax(dim=-1)
        log_q_RV = contrastive_log_probs(log_aligned_RV, log_base_RV, self.settings.alpha, self.settings.plausibility)
        return log_q_RV.sub_(log_q_RV.amax(dim=-1, keepdim=True))

    def _penalty_block(self, part: RowLogits, factor_R: Tensor, buffers: list[Tensor]) -> PenaltyRows:
        assert part.base_CV is not None
        assert self.base is not None
        student_work, aligned_work, base_work, probability_RV, aligned_probability_RV = buffers
        base_RV, _ = _read(part.base_CV, self.base, 1.0, base_work)
        base_norm_R1 = normalise_(base_RV, out_RV=probability_RV)
        aligned_RV, _ = _read(part.aligned_CV, self.aligned, 1.0, aligned_work)
        aligned_norm_R1 = normalise_(aligned_RV, out_RV=aligned_probability_RV)
        row_F, token_F, log_base_F = self._favored(aligned_RV, aligned_norm_R1, base_RV, base_norm_R1)
        top = top_tokens(probability_RV.fill_(-math.inf), row_F, token_F, log_base_F, self.settings.top_tokens)

        depth_R1 = self._kl(aligned_probability_RV, aligned_RV, base_RV, out_RV=base_RV)
        depth_R1 = depth_R1 + base_norm_R1 - aligned_norm_R1
        deficit_R1 = deficit(depth_R1, self.settings.kappa)

        student_RV, shift_R1 = _read(part.student_CV, self.student, 1.0, student_work)
        student_norm_R1 = normalise_(student_RV, out_RV=probability_RV)
        kl_R1 = self._kl(aligned_probability_RV, aligned_RV, student_RV, out_RV=aligned_RV)
        favored_F = probability_RV[row_F, token_F]

        def over_favored(values_F: Tensor) -> Tensor:
            return torch.zeros_like(factor_R).index_add_(0, row_F, values_F)

        square_R = over_favored(favored_F.square())
        if part.gradient_CV is not None:
            scale_R = 2.0 * deficit_R1[:, 0] * factor_R
            probability_RV.mul_((-scale_R * square_R)[:, None])
            probability_RV[row_F, token_F] += scale_R[row_F] * favored_F.square()
            self._write(probability_RV, student_RV, shift_R1, 1.0, part.gradient_CV)
        return PenaltyRows(
            deficit_R1[:, 0] * square_R,
            over_favored(log_base_F.exp()),
            depth_R1[:, 0],
            deficit_R1[:, 0],
            over_favored(favored_F),
            (kl_R1 + student_norm_R1 - aligned_norm_R1)[:, 0],
            *top,
        )

    def _favored(
        self, aligned_RV: Tensor, aligned_norm_R1: Tensor, base_RV: Tensor, base_norm_R1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, token and log p_b of each member of B_t [F]: with tau above 0 at most 1 / tau a row."""
        log_tau = math.log(self.settings.tau) if self.settings.tau > 0 else -math.inf
        row_F, token_F = (base_RV >= base_norm_R1 + log_tau).nonzero(as_tuple=True)
        log_base_F = base_RV[row_F, token_F] - base_norm_R1[row_F, 0]
        log_aligned_F = aligned_RV[row_F, token_F] - aligned_norm_R1[row_F, 0]
        kept_F = log_base_F > log_aligned_F + self.settings.margin
        return row_F[kept_F], token_F[kept_F], log_base_F[kept_F]

    def _kl(self, probability_RV: Tensor, logits_RV: Tensor, other_RV: Tensor, out_RV: Tensor) -> Tensor:
        """sum p (z - z') [R, 1]: KL of two softmaxes less the difference of their normalisers."""
        difference_RV = torch.sub(logits_RV, other_RV, out=out_RV)
        if self.excludes:
            difference_RV.masked_fill_(probability_RV == 0, 0.0)
        return row_dot(probability_RV, difference_RV)

    def _write(
        self, grad_RV: Tensor, logits_RV: Tensor, shift_R1: Tensor, temperature: float, out_RV: Tensor | None
    ) -> None:
        """Carries a gradient from logits, as `_read` gave them, to the matrix product; overwrites what it reads."""
        if out_RV is None:
            return
        if self.student.softcap is not None:
            logits_RV.add_(shift_R1).mul_(temperature)
        out_RV.copy_(self.student.raw_gradient_(logits_RV, grad_RV))


def top_tokens(
    score_RV: Tensor, row_F: Tensor, token_F: Tensor, log_base_F: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The likeliest members of B_t under base: tokens and p_b [R, count]; `score_RV` comes full of -inf."""
    score_RV[row_F, token_F] = log_base_F
    best = score_RV.topk(min(count, score_RV.shape[1]), dim=-1)
    padding = (0, count - best.values.shape[1])
    token_RK = best.indices.masked_fill(torch.isneginf(best.values), -1)
    return torch.nn.functional.pad(token_RK, padding, value=-1), torch.nn.functional.pad(best.values.exp(), padding)


def _excludes_tokens(head: Head) -> bool:
    """Whether logits can be -inf: finite hidden states leave only the bias, and a softcap bounds that too."""
    return head.bias_V is not None and head.softcap is None and bool(torch.isneginf(head.bias_V).any())


def _read(raw_RV: Tensor, head: Head, temperature: float, work_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Logits over temperature from the matrix product, less their largest value of each row, and that value [R, 1].

    Where the product has the right dtype it is worked on in place.
    """
    logits_RV = raw_RV if raw_RV.dtype == work_RV.dtype else work_RV.copy_(raw_RV)
    if head.bias_V is not None:
        logits_RV += head.bias_V
    if head.softcap is not None:
        logits_RV.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / temperature)
    elif head.scale != temperature:
        logits_RV.mul_(head.scale / temperature)
    shift_R1 = logits_RV.amax(dim=-1, keepdim=True)
    return logits_RV.sub_(shift_R1), shift_R1
