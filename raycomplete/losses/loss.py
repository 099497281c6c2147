"""The completion loss: anchor, recovery and penalty in one pass, without [N, V] logits in memory.

Rows are walked in chunks. While the logits of a chunk are in hand its gradients are taken analytically and summed into
[N, H] and [V, H] buffers, so peak memory is O(N*H + V*H + chunk*V) and backward only scales what was saved. The
formulas are ours, not those of arXiv 2511.12155; `loss_reference` states them plainly.

`walk` cuts the chunks and multiplies matrices on every device. What happens to a chunk's logits in between has two
backends: `row_losses` in PyTorch, and `kernels` in Triton for CUDA. "auto" takes Triton on a CUDA device where it is
installed, for heads in bfloat16, float16 or float32; everything else goes to PyTorch, float64 among it. Both do every
divergence and setting.

Letters: N token rows, C rows of one chunk, P rows that need base (inputs) or penalty rows (`LossOutput`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.losses.checks import check_loss_inputs, check_rows_finite
from raycomplete.losses.chunked_pass import Source, walk
from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossOutput, LossSettings, TokenKind, needs_base

__all__ = ["LossOutput", "LossSettings", "TokenKind", "distillation_loss", "needs_base"]


def distillation_loss(
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
) -> LossOutput:
    """Weighted sum of T^2 D(q, p_s) on anchor and recovery rows and g_t * sum over B_t of p_s(v)^2 on penalty rows.

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
        must_be_finite: Whether NaN and infinity are refused. Else they reach the rows that they belong to, the loss and
            its gradients, for a caller that leaves such a step out.

    Returns:
        The loss in float32 (float64 for a float64 student head), with its parts and per-row measurements.

    Raises:
        ValueError: Shapes, vocabularies, kinds or the student's dtype do not fit.
        NotFiniteError: An input holds NaN or infinity, or a row's loss came out so, where `must_be_finite`; names it
            and the first bad row.
        SetupError: The settings ask for Triton where it does not run.
    """
    check_loss_inputs(
        student_hidden_NH,
        student_head,
        aligned_hidden_NH,
        aligned_head,
        base_hidden_PH,
        base_head,
        kind_N,
        weight_N,
        settings,
        must_be_finite=must_be_finite,
    )
    device, dtype = student_hidden_NH.device, student_head.logits_dtype
    kind_N = kind_N.detach().to(device)
    weight_N = weight_N.detach().to(device, dtype)
    factor_N = weight_N * settings.part_weight(kind_N, dtype)
    base = None if base_hidden_PH is None or base_head is None else Source(base_hidden_PH, base_head)

    with torch.autocast(device.type, enabled=False):  # dtypes are those of the heads, not of an outer autocast
        walked = walk(
            Source(student_hidden_NH, student_head),
            Source(aligned_hidden_NH, aligned_head),
            base,
            kind_N,
            factor_N,
            settings,
        )
        if must_be_finite:
            check_rows_finite("the loss of the student", walked.row_loss_N)
        weighted_N = weight_N * walked.row_loss_N
        total = walked.gradients.attach((factor_N * walked.row_loss_N).sum())

    penalty = walked.penalty
    return LossOutput(
        total=total,
        anchor=weighted_N[kind_N == TokenKind.ANCHOR].sum(),
        recovery=weighted_N[kind_N == TokenKind.RECOVERY].sum(),
        penalty=weighted_N[kind_N == TokenKind.PENALTY].sum(),
        row_loss_N=walked.row_loss_N,
        base_favored_mass_P=penalty.base_favored_mass_P,
        alignment_kl_P=penalty.alignment_kl_P,
        deficit_P=penalty.deficit_P,
        student_mass_P=penalty.student_mass_P,
        aligned_student_kl_P=penalty.aligned_student_kl_P,
        top_token_PK=penalty.top_token_PK,
        top_mass_PK=penalty.top_mass_PK,
    )
