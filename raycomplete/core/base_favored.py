"""Where alignment stopped: base-favored tokens, trained depth and deficit.

The idea of base-favored tokens is from arXiv 2511.12155 (known to us by its abstract and secondary reports). The
formulas below are ours, not the paper's. All take log-probabilities over the vocabulary, -inf allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raycomplete.core.checks import check_hidden, check_same_vocabulary
from raycomplete.core.chunks import ChunkTokens, rows_per_chunk
from raycomplete.core.heads import Head

_PROFILE_COPIES = 4  # tensors as large as the logits that a chunk of the profile makes per model


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) of each row, with 0 * log 0 = 0; differentiable without NaN where p is 0.

    Args:
        log_p_NV: Log-probabilities [N, V].
        log_q_NV: Log-probabilities [N, V].

    Returns:
        [N] in nats; infinite where p gives mass to what q excludes.
    """
    # Filling before subtracting, not after: a masked -inf - -inf would still send NaN backwards.
    excluded_NV = torch.isneginf(log_p_NV)
    ratio_NV = log_p_NV.masked_fill(excluded_NV, 0.0) - log_q_NV.masked_fill(excluded_NV, 0.0)
    return (log_p_NV.exp() * ratio_NV).sum(dim=-1)


def base_favored_mask(log_aligned_NV: Tensor, log_base_NV: Tensor, tau: float, margin: float = 0.0) -> Tensor:
    """B_t = {v : log p_b(v) > log p_a(v) + margin and p_b(v) >= tau}. The formula is ours.

    Args:
        log_aligned_NV: log p_a [N, V].
        log_base_NV: log p_b [N, V].
        tau: Smallest base probability that counts, 0 to 1.
        margin: Nats by which base must prefer the token, not negative.

    Returns:
        Boolean [N, V].
    """
    log_tau = math.log(tau) if tau > 0 else -math.inf
    return (log_base_NV > log_aligned_NV + margin) & (log_base_NV >= log_tau)


def base_favored_mass(log_aligned_NV: Tensor, log_base_NV: Tensor, tau: float, margin: float = 0.0) -> Tensor:
    """m_t = sum over B_t of p_b(v): how much of what base would say the policy says less. The formula is ours.

    Args:
        log_aligned_NV: log p_a [N, V].
        log_base_NV: log p_b [N, V].
        tau: Smallest base probability that counts, 0 to 1.
        margin: Nats by which base must prefer a token that counts, not negative.

    Returns:
        [N], 0 to 1.
    """
    mask_NV = base_favored_mask(log_aligned_NV, log_base_NV, tau, margin)
    return (log_base_NV.exp() * mask_NV).sum(dim=-1)


def trained_depth(log_aligned_NV: Tensor, log_base_NV: Tensor) -> Tensor:
    """k_t = KL(p_a || p_b): how far alignment moved the model at this position. The formula is ours.

    Args:
        log_aligned_NV: log p_a [N, V].
        log_base_NV: log p_b [N, V].

    Returns:
        [N] in nats.
    """
    return forward_kl(log_aligned_NV, log_base_NV)


def deficit(trained_depth_N: Tensor, kappa: float) -> Tensor:
    """g_t = exp(-k_t / kappa): near 1 where alignment changed nothing. The formula is ours.

    Args:
        trained_depth_N: k_t [N] in nats.
        kappa: Scale in nats, positive.

    Returns:
        [N], 0 to 1.
    """
    # Rounding can make a KL of equal distributions a hair negative; a deficit above 1 would be meaningless.
    return torch.exp(-trained_depth_N.clamp(min=0.0) / kappa)


@dataclass(frozen=True, eq=False)
class ProfileRows:
    """How far a policy has moved from base, by token row.

    Attributes:
        mass_N: Base-favored mass [N], 0 to 1.
        kl_N: Trained depth KL(policy || base) [N] in nats.
        deficit_N: exp(-kl / kappa) [N], 0 to 1.
    """

    mass_N: Tensor
    kl_N: Tensor
    deficit_N: Tensor


@torch.no_grad()
def profile_rows(
    policy_hidden_NH: Tensor,
    policy_head: Head,
    base_hidden_NH: Tensor,
    base_head: Head,
    tau: float,
    kappa: float,
    chunk_tokens: ChunkTokens,
    margin: float = 0.0,
) -> ProfileRows:
    """Compares a policy (aligned or student) with base at every token row; the formulas are ours.

    Logits exist for `chunk_tokens` rows at a time.

    Args:
        policy_hidden_NH: Hidden states of the policy [N, H of its head].
        policy_head: Head of the policy.
        base_hidden_NH: Hidden states of base on the same tokens [N, H of its head].
        base_head: Head of base.
        tau: Smallest base probability that counts, 0 to 1.
        kappa: Scale of the deficit in nats.
        chunk_tokens: Rows of one chunk, at least 1, or "auto".
        margin: Nats by which base must prefer a token that counts, not negative.

    Returns:
        One value a row, in at least float32, on the device of the hidden states.

    Raises:
        ValueError: Shapes or vocabularies do not fit together.
        NotFiniteError: Hidden states hold NaN or infinity.
    """
    num_rows = policy_hidden_NH.shape[0]
    check_hidden("policy", policy_hidden_NH, policy_head, num_rows)
    check_hidden("base", base_hidden_NH, base_head, num_rows)
    check_same_vocabulary({"policy": policy_head, "base": base_head})
    dtype, device = policy_head.logits_dtype, policy_hidden_NH.device
    size = rows_per_chunk(chunk_tokens, policy_head.vocab_size, dtype, device, copies=_PROFILE_COPIES)
    mass_N = policy_hidden_NH.new_zeros(num_rows, dtype=policy_head.logits_dtype)
    kl_N = torch.zeros_like(mass_N)
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        log_policy_CV = policy_head.logits(policy_hidden_NH[rows]).log_softmax(dim=-1)
        log_base_CV = base_head.logits(base_hidden_NH[rows]).log_softmax(dim=-1)
        mass_N[rows] = base_favored_mass(log_policy_CV, log_base_CV, tau, margin).to(mass_N.dtype)
        kl_N[rows] = trained_depth(log_policy_CV, log_base_CV).to(kl_N.dtype)
    return ProfileRows(mass_N=mass_N, kl_N=kl_N, deficit_N=deficit(kl_N, kappa))
