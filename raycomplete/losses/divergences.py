"""The target q of the hybrid teacher, and divergences D(q, p_s) of token rows with their gradients.

With student logits u and target logits v, each with a largest value of 0, and r = log p_s - log q:
- forward KL: sum q (log q - log p_s);      gradient in u: p_s - q
- reverse KL: sum p_s r;                    gradient in u: p_s (r - D)
- JSD: (KL(q || m) + KL(p_s || m)) / 2 with m = (q + p_s) / 2;    gradient in u: p_s (a - sum p_s a) / 2, where
  a = log(p_s / m) = log 2 + log sigmoid(r), and log(q / m) = a - r.

The contrastive target is in the manner of contrastive decoding; its formula is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from raycomplete.losses.settings import Divergence

# A ratio of e^200 leaves nothing of the smaller probability in float64, so clamping log ratios there changes no sum; it
# keeps 0 * inf out of them.
_MAX_LOG_RATIO = 200.0

# Stands in for log 0 of base. Low enough that no finite logit reaches it, and (1 + alpha) times it is still finite.
_LOG_ZERO = -1e30

FusedDivergence = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]


def contrastive_log_probs(log_aligned_NV: Tensor, log_base_NV: Tensor, alpha: float, plausibility: float) -> Tensor:
    """Log-probabilities of q(v) ~ p_a(v) (p_a(v) / p_b(v))^alpha where p_a(v) >= plausibility * max p_a, else 0.

    Where base excludes a plausible token, q goes wholly to such tokens (the limit p_b -> 0).

    Args:
        log_aligned_NV: log p_a [N, V], -inf allowed.
        log_base_NV: log p_b [N, V], -inf allowed.
        alpha: Strength, not negative; 0 returns `log_aligned_NV` itself, without the plausibility mask.
        plausibility: Share of the largest p_a below which a token is excluded, above 0, at most 1.

    Returns:
        [N, V], normalised; -inf at excluded tokens.
    """
    if alpha == 0:
        return log_aligned_NV
    log_floor_N1 = log_aligned_NV.amax(dim=-1, keepdim=True) + math.log(plausibility)
    implausible_NV = log_aligned_NV < log_floor_N1
    # Filled before the arithmetic, so that -inf of an excluded token reaches neither the result nor its gradient.
    aligned_NV = log_aligned_NV.masked_fill(implausible_NV, 0.0)
    base_NV = log_base_NV.masked_fill(implausible_NV, 0.0).clamp(min=_LOG_ZERO)
    score_NV = aligned_NV + alpha * (aligned_NV - base_NV)
    return torch.log_softmax(score_NV.masked_fill(implausible_NV, -math.inf), dim=-1)


def normalise_(logits_RV: Tensor, out_RV: Tensor) -> Tensor:
    """Writes the softmax to `out_RV`; returns the log of its normaliser [R, 1].

    The largest logit must be 0: then the largest probability is 1 / normaliser, which spares a pass of exponentials,
    and the normaliser is at most log V, so that subtracting it from a logit loses nothing however large logits were.
    """
    torch.softmax(logits_RV, dim=-1, out=out_RV)
    return out_RV.amax(dim=-1, keepdim=True).log_().neg_()


def row_dot(first_RV: Tensor, second_RV: Tensor) -> Tensor:
    """Computes the inner product of each row [R, 1]."""
    products_R: Tensor = torch.linalg.vecdot(first_RV, second_RV)
    return products_R[:, None]


def forward_kl_(
    student_RV: Tensor, target_RV: Tensor, work_RV: Tensor, target_work_RV: Tensor, excludes: bool
) -> Tensor:
    """Computes KL(q || p_s).

    Args:
        student_RV: Logits of p_s [R, V]; kept.
        target_RV: Logits of q [R, V]; overwritten.
        work_RV: Receives the gradient in the student's logits [R, V].
        target_work_RV: Overwritten [R, V].
        excludes: Whether logits may be -inf.

    Returns:
        Row losses [R, 1] in nats.
    """
    student_norm_R1 = normalise_(student_RV, out_RV=work_RV)
    target_norm_R1 = normalise_(target_RV, out_RV=target_work_RV)
    difference_RV = target_RV.sub_(student_RV)
    if excludes:
        difference_RV.masked_fill_(target_work_RV == 0, 0.0)  # 0 log 0 = 0
    loss_R1 = row_dot(target_work_RV, difference_RV) + student_norm_R1 - target_norm_R1
    work_RV.sub_(target_work_RV)
    return loss_R1


def reverse_kl_(
    student_RV: Tensor, target_RV: Tensor, work_RV: Tensor, target_work_RV: Tensor, excludes: bool
) -> Tensor:
    """Computes KL(p_s || q); arguments and result as in `forward_kl_`."""
    ratio_RV = _log_ratio_(student_RV, target_RV, work_RV, target_work_RV)
    if excludes:
        ratio_RV.masked_fill_(work_RV == 0, 0.0)
    loss_R1 = row_dot(work_RV, ratio_RV)
    work_RV.mul_(ratio_RV.sub_(loss_R1))
    return loss_R1


def jsd_(student_RV: Tensor, target_RV: Tensor, work_RV: Tensor, target_work_RV: Tensor, excludes: bool) -> Tensor:
    """Computes the Jensen-Shannon divergence; arguments and result as in `forward_kl_`."""
    ratio_RV = _log_ratio_(student_RV, target_RV, work_RV, target_work_RV)
    if excludes:
        ratio_RV.nan_to_num_(nan=0.0)  # excluded by both
    ratio_RV.clamp_(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    student_to_mean_RV = torch.nn.functional.logsigmoid(ratio_RV).add_(math.log(2.0))
    target_to_mean_RV = torch.sub(student_to_mean_RV, ratio_RV, out=ratio_RV)
    student_part_R1 = row_dot(work_RV, student_to_mean_RV)
    loss_R1 = 0.5 * (student_part_R1 + row_dot(target_work_RV, target_to_mean_RV))
    work_RV.mul_(student_to_mean_RV.sub_(student_part_R1)).mul_(0.5)
    return loss_R1


def _log_ratio_(student_RV: Tensor, target_RV: Tensor, work_RV: Tensor, target_work_RV: Tensor) -> Tensor:
    """Writes log p_s - log q over `target_RV`; leaves p_s in `work_RV` and q in `target_work_RV`."""
    student_norm_R1 = normalise_(student_RV, out_RV=work_RV)
    target_norm_R1 = normalise_(target_RV, out_RV=target_work_RV)
    return torch.sub(student_RV, target_RV, out=target_RV).sub_(student_norm_R1 - target_norm_R1)


FUSED: dict[Divergence, FusedDivergence] = {"forward_kl": forward_kl_, "reverse_kl": reverse_kl_, "jsd": jsd_}
