"""The completion loss as plainly as it can be written: float64, all logits in memory, autograd. For tests.

It shares nothing with `loss` but the types, so that agreement means something. The formulas are ours, not those of
arXiv 2511.12155.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.core.heads import Head
from raycomplete.core.loss_types import LossOutput, LossSettings, TokenKind, needs_base


def reference_loss(
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
    """Same arguments and result as `loss.completion_loss`, in float64, without its checks; takes [N, V] memory."""
    student_NV = _probabilities(student_hidden_NH, student_head)
    log_student_NV = torch.log_softmax(_logits(student_hidden_NH, student_head), dim=-1)
    aligned_NV = _probabilities(aligned_hidden_NH, aligned_head).detach()
    log_aligned_NV = torch.log_softmax(_logits(aligned_hidden_NH, aligned_head), dim=-1).detach()
    log_base_NV = torch.zeros_like(log_aligned_NV)
    if base_hidden_PH is not None and base_head is not None:
        needed_N = needs_base(kind_N, settings)
        log_base_NV[needed_N] = torch.log_softmax(_logits(base_hidden_PH, base_head), dim=-1).detach()

    # KL(q || p_s)
    if settings.alpha == 0:
        log_target_NV = log_aligned_NV
    else:
        plausible_NV = aligned_NV >= settings.plausibility * aligned_NV.max(dim=-1, keepdim=True).values
        log_score_NV = log_aligned_NV + settings.alpha * (log_aligned_NV - log_base_NV)
        log_target_NV = torch.log_softmax(log_score_NV.masked_fill(~plausible_NV, -torch.inf), dim=-1)
    kl_N = _kl(log_target_NV, log_student_NV)

    # g_t * sum over B_t of p_s(v)^2
    base_NV = log_base_NV.exp()
    favored_NV = (log_base_NV > log_aligned_NV) & (base_NV >= settings.tau)
    trained_depth_N = _kl(log_aligned_NV, log_base_NV)
    deficit_N = torch.exp(-trained_depth_N / settings.kappa)
    penalty_N = deficit_N * (student_NV.square() * favored_NV).sum(dim=-1)

    is_penalty_N = kind_N == TokenKind.PENALTY
    row_loss_N = torch.where(is_penalty_N, penalty_N, kl_N)
    weighted_N = weight_N.double() * row_loss_N
    anchor = weighted_N[kind_N == TokenKind.ANCHOR].sum()
    recovery = weighted_N[kind_N == TokenKind.RECOVERY].sum()
    penalty = weighted_N[is_penalty_N].sum()
    return LossOutput(
        total=settings.anchor * anchor + settings.recovery * recovery + settings.penalty * penalty,
        anchor=anchor.detach(),
        recovery=recovery.detach(),
        penalty=penalty.detach(),
        row_loss_N=row_loss_N.detach(),
        base_favored_mass_P=(base_NV * favored_NV).sum(dim=-1)[is_penalty_N],
        trained_depth_P=trained_depth_N[is_penalty_N],
        deficit_P=deficit_N[is_penalty_N],
        student_mass_P=(student_NV * favored_NV).sum(dim=-1)[is_penalty_N].detach(),
    )


def _logits(hidden_NH: Tensor, head: Head) -> Tensor:
    logits_NV = hidden_NH.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    p_NV = log_p_NV.exp()
    return torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(dim=-1)  # 0 log 0 = 0


def _probabilities(hidden_NH: Tensor, head: Head) -> Tensor:
    return torch.softmax(_logits(hidden_NH, head), dim=-1)
