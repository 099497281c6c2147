"""The completion loss as plainly as it can be written: float64, all logits in memory, autograd. For tests.

It shares nothing with `loss` but the types, so that agreement means something. The formulas are ours, not those of
arXiv 2511.12155.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.config.training import Divergence
from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossOutput, LossSettings, TokenKind, needs_base


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
    """Same arguments and result as `loss.distillation_loss`, in float64, without its checks; takes [N, V] memory."""
    needed_N = needs_base(kind_N, settings)
    student_NV = _logits(student_hidden_NH, student_head)
    aligned_NV = _logits(aligned_hidden_NH, aligned_head).detach()
    base_NV = torch.zeros_like(aligned_NV)
    if base_hidden_PH is not None and base_head is not None:
        base_NV[needed_N] = _logits(base_hidden_PH, base_head).detach()

    divergence_N = _divergences(student_NV, aligned_NV, base_NV, kind_N, settings)

    # g_t * sum over B_t of p_s(v)^2
    log_student_NV, log_aligned_NV, log_base_NV = (
        torch.log_softmax(logits_NV, dim=-1) for logits_NV in (student_NV, aligned_NV, base_NV)
    )
    p_student_NV, p_base_NV = log_student_NV.exp(), log_base_NV.exp()
    exceeds_NV = log_base_NV - log_aligned_NV > settings.margin  # -inf - -inf is NaN, which exceeds nothing
    favored_NV = exceeds_NV & (p_base_NV >= settings.tau)
    alignment_kl_N = _kl(log_aligned_NV, log_base_NV)
    deficit_N = torch.exp(-alignment_kl_N / settings.kappa)
    penalty_N = deficit_N * (p_student_NV.square() * favored_NV).sum(dim=-1)

    is_penalty_N = kind_N == TokenKind.PENALTY
    row_loss_N = torch.where(is_penalty_N, penalty_N, divergence_N)
    weighted_N = weight_N.double() * row_loss_N
    anchor = weighted_N[kind_N == TokenKind.ANCHOR].sum()
    recovery = weighted_N[kind_N == TokenKind.RECOVERY].sum()
    penalty = weighted_N[is_penalty_N].sum()
    top_token_PK, top_mass_PK = _top_tokens((p_base_NV * favored_NV)[is_penalty_N], settings.top_tokens)
    return LossOutput(
        total=settings.anchor * anchor + settings.recovery * recovery + settings.penalty * penalty,
        anchor=anchor.detach(),
        recovery=recovery.detach(),
        penalty=penalty.detach(),
        row_loss_N=row_loss_N.detach(),
        base_favored_mass_P=(p_base_NV * favored_NV).sum(dim=-1)[is_penalty_N],
        alignment_kl_P=alignment_kl_N[is_penalty_N],
        deficit_P=deficit_N[is_penalty_N],
        student_mass_P=(p_student_NV * favored_NV).sum(dim=-1)[is_penalty_N].detach(),
        aligned_student_kl_P=_kl(log_aligned_NV, log_student_NV)[is_penalty_N].detach(),
        top_token_PK=top_token_PK,
        top_mass_PK=top_mass_PK,
    )


def _divergences(
    student_NV: Tensor, aligned_NV: Tensor, base_NV: Tensor, kind_N: Tensor, settings: LossSettings
) -> Tensor:
    """T^2 D(q, p_s) of every row, by the divergence of its kind."""
    log_student_NV, log_aligned_NV, log_base_NV = (
        torch.log_softmax(logits_NV / settings.temperature, dim=-1) for logits_NV in (student_NV, aligned_NV, base_NV)
    )
    log_target_NV = log_aligned_NV
    if settings.alpha > 0:
        aligned_NV = log_aligned_NV.exp()
        plausible_NV = aligned_NV >= settings.plausibility * aligned_NV.max(dim=-1, keepdim=True).values
        log_score_NV = log_aligned_NV + settings.alpha * (log_aligned_NV - log_base_NV)
        log_target_NV = torch.log_softmax(log_score_NV.masked_fill(~plausible_NV, -torch.inf), dim=-1)

    def of(name: Divergence) -> Tensor:
        if name == "forward_kl":
            return _kl(log_target_NV, log_student_NV)
        if name == "reverse_kl":
            return _kl(log_student_NV, log_target_NV)
        mean_NV = (log_student_NV.exp() + log_target_NV.exp()) / 2
        log_mean_NV = mean_NV.masked_fill(mean_NV == 0, 1.0).log()  # _kl reads none of those
        return (_kl(log_target_NV, log_mean_NV) + _kl(log_student_NV, log_mean_NV)) / 2

    is_anchor_N = kind_N == TokenKind.ANCHOR
    chosen_N = torch.where(is_anchor_N, of(settings.anchor_divergence), of(settings.recovery_divergence))
    return settings.temperature**2 * chosen_N


def _logits(hidden_NH: Tensor, head: Head) -> Tensor:
    logits_NV = hidden_NH.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    nothing_NV = log_p_NV.exp() == 0  # 0 log 0 = 0; filled before the arithmetic, so that no gradient is NaN
    log_p_NV, log_q_NV = log_p_NV.masked_fill(nothing_NV, 0.0), log_q_NV.masked_fill(nothing_NV, 0.0)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).masked_fill(nothing_NV, 0.0).sum(dim=-1)


def _top_tokens(favored_mass_PV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and p_b of the likeliest base-favored tokens [P, count], by sorting everything."""
    token_PK = torch.full((len(favored_mass_PV), count), -1)
    mass_PK = torch.zeros(len(favored_mass_PV), count, dtype=torch.float64)
    mass_PV, order_PV = favored_mass_PV.sort(dim=-1, descending=True)
    for row in range(len(favored_mass_PV)):
        found = min(count, int((mass_PV[row] > 0).sum()))
        token_PK[row, :found], mass_PK[row, :found] = order_PV[row, :found], mass_PV[row, :found]
    return token_PK, mass_PK
