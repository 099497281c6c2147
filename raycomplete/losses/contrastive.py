"""The target distribution of the hybrid teacher.

Which context the teacher reads (benign context for the anchor, harmful prefix stripped for recovery) is decided where
sequences are built; this file turns its log-probabilities into the target q. The optional contrastive sharpening is in
the manner of contrastive decoding; the formula is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Stands in for log 0 of base. Low enough that no finite logit reaches it, and (1 + alpha) times it is still finite.
_LOG_ZERO = -1e30


def contrastive_log_probs(log_aligned_NV: Tensor, log_base_NV: Tensor, alpha: float, plausibility: float) -> Tensor:
    """Log-probabilities of q(v) ~ p_a(v) (p_a(v) / p_b(v))^alpha where p_a(v) >= plausibility * max p_a, else 0.

    The formula is ours. Where base excludes a plausible token, q goes wholly to such tokens (the limit p_b -> 0).

    Args:
        log_aligned_NV: log p_a [N, V], -inf allowed.
        log_base_NV: log p_b [N, V], -inf allowed.
        alpha: Strength; 0 returns `log_aligned_NV` itself, without the plausibility mask.
        plausibility: Share of the largest p_a below which a token is excluded, above 0, at most 1.

    Returns:
        [N, V], normalised; -inf at excluded tokens.

    Raises:
        ValueError: alpha is negative, or plausibility is not within (0, 1].
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}.")
    if not 0 < plausibility <= 1:
        raise ValueError(f"plausibility must be above 0 and at most 1, got {plausibility}.")
    if alpha == 0:
        return log_aligned_NV
    log_floor_N1 = log_aligned_NV.amax(dim=-1, keepdim=True) + math.log(plausibility)
    implausible_NV = log_aligned_NV < log_floor_N1
    # Filled before the arithmetic, so that -inf of an excluded token reaches neither the result nor its gradient.
    aligned_NV = log_aligned_NV.masked_fill(implausible_NV, 0.0)
    base_NV = log_base_NV.masked_fill(implausible_NV, 0.0).clamp(min=_LOG_ZERO)
    score_NV = aligned_NV + alpha * (aligned_NV - base_NV)
    return torch.log_softmax(score_NV.masked_fill(implausible_NV, -math.inf), dim=-1)
