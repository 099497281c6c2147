"""Loss, metrics and gradient of token rows whose logits are in hand, in PyTorch on any device.

Rows are worked through in blocks that stay in cache, in buffers that are made once: from float32 copies of the matrix
products to a gradient that is written where the student's product stood. `kernels` does the same on CUDA.

C rows of one call, R rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raycomplete.losses.divergences import FUSED, contrastive_log_probs
from raycomplete.losses.heads import Head
from raycomplete.losses.settings import DivergenceSettings

_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}  # of one buffer; on a CPU all four stay near the core


@dataclass(frozen=True, eq=False)
class TermRows:
    """Loss and metrics of some rows of one term.

    Attributes:
        loss_R: Loss of each row, without its weight [R].
        metrics: Values of each row by metric [R].
    """

    loss_R: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[TermRows]) -> TermRows:
        """Rows of all parts in order; at least one part."""
        metrics = {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics}
        return cls(torch.cat([part.loss_R for part in parts]), metrics)


@dataclass(frozen=True, eq=False)
class Product:
    """Matrix products hidden @ weight^T of some rows with one model's head.

    Attributes:
        product_CV: [C, V]; whoever computes the rows' losses may overwrite it.
        head: The head, for what comes after the product.
    """

    product_CV: Tensor
    head: Head


@dataclass(frozen=True, eq=False)
class RowLogits:
    """Everything that a term needs of some of its rows.

    Attributes:
        student: The student's products.
        aligned: The aligned model's, or None where the term does not read it.
        base: Base's, or None where the term does not read it.
        factor_C: Weight of each row's gradient [C].
        gradient_CV: Where the gradient with respect to hidden @ weight^T + bias goes [C, V]; may share memory with the
            student's products; None where no gradient is wanted.
        token_C: Token that follows at each row [C], or None where nobody gave them.
    """

    student: Product
    aligned: Product | None
    base: Product | None
    factor_C: Tensor
    gradient_CV: Tensor | None
    token_C: Tensor | None

    def rows(self, rows: slice) -> RowLogits:
        """Takes some of the rows, as views."""

        def part(product: Product | None) -> Product | None:
            return None if product is None else replace(product, product_CV=product.product_CV[rows])

        return RowLogits(
            replace(self.student, product_CV=self.student.product_CV[rows]),
            part(self.aligned),
            part(self.base),
            self.factor_C[rows],
            None if self.gradient_CV is None else self.gradient_CV[rows],
            None if self.token_C is None else self.token_C[rows],
        )


@dataclass(frozen=True, eq=False)
class Block:
    """A few rows, and buffers for them [R, V] in float32 (float64 for a float64 head).

    Attributes:
        logits: The rows.
        buffers: Four of them, to be used at will.
        excludes: Whether logits can be -inf.
    """

    logits: RowLogits
    buffers: list[Tensor]
    excludes: bool

    def read(self, product: Product | None, work_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Logits over temperature less their largest value of each row [R, V], and that value [R, 1].

        Where the product has the dtype of the buffers it is worked on in place, else in `work_RV`.
        """
        assert product is not None, "the term does not read this model"
        raw_RV, head = product.product_CV, product.head
        logits_RV = raw_RV if raw_RV.dtype == work_RV.dtype else work_RV.copy_(raw_RV)
        if head.bias_V is not None:
            logits_RV += head.bias_V
        if head.softcap is not None:
            logits_RV.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / temperature)
        elif head.scale != temperature:
            logits_RV.mul_(head.scale / temperature)
        shift_R1 = logits_RV.amax(dim=-1, keepdim=True)
        return logits_RV.sub_(shift_R1), shift_R1

    def write(self, grad_RV: Tensor, logits_RV: Tensor, shift_R1: Tensor, temperature: float) -> None:
        """Carries a gradient from the student's logits, as `read` gave them, to its product; overwrites both inputs."""
        head, out_RV = self.logits.student.head, self.logits.gradient_CV
        if out_RV is None:
            return
        if head.softcap is not None:
            logits_RV.add_(shift_R1).mul_(temperature)
        out_RV.copy_(head.raw_gradient_(logits_RV, grad_RV))


BlockFunction = Callable[[Block, Any], TermRows]
"""Computes a term, with the settings of its options class, on the rows of a block, and writes the gradient of factor
times loss."""


class TorchRows:
    """The PyTorch backend."""

    def __init__(self, student: Head, teachers: Sequence[Head], max_rows: int) -> None:
        self.excludes = any(_excludes_tokens(head) for head in (student, *teachers))
        weight_VH, dtype = student.weight_VH, student.logits_dtype
        budget = _BLOCK_BYTES.get(weight_VH.device.type, _BLOCK_BYTES["cpu"])
        self.block_rows = max(1, min(max_rows, budget // (student.vocab_size * dtype.itemsize)))
        self.buffers = [weight_VH.new_empty(self.block_rows, student.vocab_size, dtype=dtype) for _ in range(4)]

    def run(self, function: BlockFunction, options: Any, logits: RowLogits) -> TermRows:
        """Calls a function block by block; at least one row."""
        return TermRows.join([function(block, options) for block in self._blocks(logits)])

    def _blocks(self, logits: RowLogits) -> Iterator[Block]:
        num_rows = len(logits.factor_C)
        for start in range(0, num_rows, self.block_rows):
            rows = slice(start, min(start + self.block_rows, num_rows))
            yield Block(logits.rows(rows), [buffer[: rows.stop - start] for buffer in self.buffers], self.excludes)


def divergence_block(block: Block, options: DivergenceSettings) -> TermRows:
    """Computes T^2 D(q, p_s); a `BlockFunction`."""
    temperature, factor_R = options.temperature, block.logits.factor_C
    first, second, student_work, target_work = block.buffers
    student_RV, shift_R1 = block.read(block.logits.student, first, temperature)
    target_RV = _target(block, second, options)
    excludes = block.excludes or options.contrastive.alpha > 0
    loss_R1 = FUSED[options.divergence](student_RV, target_RV, student_work, target_work, excludes)
    # T^2 of the loss, 1 / T of the chain rule
    student_work.mul_(temperature * factor_R[:, None])
    block.write(student_work, student_RV, shift_R1, temperature)
    return TermRows(loss_R1[:, 0] * temperature**2)


def _target(block: Block, work_RV: Tensor, options: DivergenceSettings) -> Tensor:
    """Logits of q [R, V], the largest of a row 0."""
    aligned_RV, _ = block.read(block.logits.aligned, work_RV, options.temperature)
    alpha, plausibility = options.contrastive.alpha, options.contrastive.plausibility
    if alpha == 0:
        return aligned_RV
    base_RV, _ = block.read(block.logits.base, block.buffers[2], options.temperature)
    log_q_RV = contrastive_log_probs(aligned_RV.log_softmax(-1), base_RV.log_softmax(-1), alpha, plausibility)
    return log_q_RV.sub_(log_q_RV.amax(dim=-1, keepdim=True))


def _excludes_tokens(head: Head) -> bool:
    """Tells whether logits can be -inf: finite hidden states leave only the bias, and a softcap bounds that too."""
    return head.bias_V is not None and head.softcap is None and bool(torch.isneginf(head.bias_V).any())
