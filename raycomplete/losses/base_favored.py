"""Measures of where alignment stopped, as plainly as can be: base-favored tokens, alignment KL and deficit.

The idea of base-favored tokens is from arXiv 2511.12155 (known to us by its abstract and secondary reports). The
formulas are ours, not the paper's. All take log-probabilities [N, V], -inf allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) [N] in nats, with 0 * log 0 = 0; differentiable without NaN where p is 0.

    It is infinite where p gives mass to what q excludes.
    """
    # Filled before subtracting, not after: a masked -inf - -inf would still send NaN backwards.
    nothing_NV = log_p_NV.exp() == 0
    log_p_NV, log_q_NV = log_p_NV.masked_fill(nothing_NV, 0.0), log_q_NV.masked_fill(nothing_NV, 0.0)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).masked_fill(nothing_NV, 0.0).sum(dim=-1)


def base_favored_mask(log_aligned_NV: Tensor, log_base_NV: Tensor, tau: float, margin: float = 0.0) -> Tensor:
    """B_t = {v : log p_b(v) > log p_a(v) + margin and p_b(v) >= tau}, boolean [N, V]."""
    log_tau = math.log(tau) if tau > 0 else -math.inf
    return (log_base_NV > log_aligned_NV + margin) & (log_base_NV >= log_tau)


def deficit(alignment_kl_N: Tensor, kappa: float) -> Tensor:
    """g_t = exp(-k_t / kappa) [N], 0 to 1, with k_t = KL(p_a || p_b): near 1 where alignment changed nothing.

    Both k_t, `alignment_kl_N`, and kappa are in nats.
    """
    # Rounding can make a KL of equal distributions a hair negative; a deficit above 1 would be meaningless.
    return torch.exp(-alignment_kl_N.clamp(min=0.0) / kappa)
