"""Words of the loss: kinds of token rows, its settings, its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from raycomplete.config import TrainConfig
from raycomplete.config.training import Divergence
from raycomplete.losses.chunks import ChunkTokens

Backend = Literal["auto", "torch", "triton"]


class TokenKind(IntEnum):
    """Which part of the loss a token row belongs to; values of `kind_N`."""

    ANCHOR = 0
    RECOVERY = 1
    PENALTY = 2


@dataclass(frozen=True)
class LossSettings:
    """Settings of the completion loss.

    Attributes:
        anchor: Weight of the anchor part.
        recovery: Weight of the recovery part.
        penalty: Weight of the penalty part (lambda).
        tau: Smallest base probability of a base-favored token, 0 to 1.
        kappa: Scale of the deficit in nats.
        alpha: Strength of the contrastive teacher; 0 is off.
        plausibility: Share of the largest p_a below which the contrastive teacher excludes a token.
        chunk_tokens: Rows whose logits exist at a time, or "auto" (see `rows_per_chunk`).
        anchor_divergence: D(q, p_s) of anchor rows: forward_kl is KL(q || p_s), reverse_kl is KL(p_s || q), jsd is
            the mean of KL(q || m) and KL(p_s || m) with m = (q + p_s) / 2.
        recovery_divergence: The same of recovery rows.
        temperature: T, which divides the logits of student and teachers on anchor and recovery rows, after softcap.
            Their divergence is multiplied by T^2, so that value and gradient keep their size as T changes.
        margin: Nats by which log p_b must exceed log p_a for a base-favored token.
        top_tokens: How many of the likeliest base-favored tokens are reported at each penalty row.
        backend: "torch", "triton", or "auto": Triton where it runs (see `raycomplete.losses.loss`), else PyTorch.
        logits_dtype: "head" rounds each matrix product to its head's dtype, as the model itself does when it
            generates; "float32" keeps it whole, which resolves smaller differences and takes twice the memory.

    Raises:
        ValueError: On construction, where a value is out of range, or reverse KL meets a contrastive teacher.
    """

    anchor: float = 1.0
    recovery: float = 1.0
    penalty: float = 0.1
    tau: float = 0.01
    kappa: float = 0.5
    alpha: float = 0.0
    plausibility: float = 0.1
    chunk_tokens: ChunkTokens = "auto"
    anchor_divergence: Divergence = "forward_kl"
    recovery_divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    margin: float = 0.0
    top_tokens: int = 0
    backend: Backend = "auto"
    logits_dtype: Literal["head", "float32"] = "head"

    def __post_init__(self) -> None:
        if self.kappa <= 0 or self.alpha < 0 or (self.chunk_tokens != "auto" and self.chunk_tokens < 1):
            raise ValueError(f"kappa must be positive, alpha not negative, chunk_tokens at least 1, got {self}.")
        if not 0 <= self.tau <= 1 or not 0 < self.plausibility <= 1:
            raise ValueError(f"tau must be within [0, 1] and plausibility within (0, 1], got {self}.")
        if self.temperature <= 0 or self.margin < 0 or self.top_tokens < 0:
            raise ValueError(f"temperature must be positive, margin and top_tokens not negative, got {self}.")
        if self.alpha > 0 and "reverse_kl" in (self.anchor_divergence, self.recovery_divergence):
            raise ValueError(
                "reverse_kl must not meet a contrastive teacher: that excludes tokens, so KL(p_s || q) is infinite. "
                "Set contrastive.alpha to 0, or use jsd or forward_kl."
            )

    @classmethod
    def from_config(cls, config: TrainConfig) -> LossSettings:
        """The settings of the `train` section of a run file."""
        return cls(
            anchor=config.weights.anchor,
            recovery=config.weights.recovery,
            penalty=config.weights.penalty,
            tau=config.penalty.tau,
            kappa=config.penalty.kappa,
            alpha=config.contrastive.alpha,
            plausibility=config.contrastive.plausibility,
            chunk_tokens=config.loss_chunk_tokens,
            anchor_divergence=config.anchor_divergence,
            recovery_divergence=config.recovery_divergence,
            temperature=config.temperature,
            margin=config.penalty.margin,
            backend=config.loss_backend,
        )

    def divergence(self, kind: TokenKind) -> Divergence:
        """Which divergence anchor or recovery rows take."""
        return self.anchor_divergence if kind == TokenKind.ANCHOR else self.recovery_divergence

    def part_weight(self, kind_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of the part that each row belongs to [N], indexed by the values of `TokenKind`."""
        weights = torch.tensor((self.anchor, self.recovery, self.penalty), dtype=dtype, device=kind_N.device)
        return weights[kind_N.long()]


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The loss and what it saw on the way.

    Here P counts the penalty rows, in their order among the N rows; everything but `total` is detached.

    Attributes:
        total: sum over rows of weight * part weight * row loss; differentiable scalar.
        anchor: sum over anchor rows of weight * row loss, without the part weight; scalar.
        recovery: The same over recovery rows.
        penalty: The same over penalty rows.
        row_loss_N: T^2 D(q, p_s) in nats, or the penalty g_t * sum over B_t of p_s(v)^2, unweighted [N].
        base_favored_mass_P: m_t [P], 0 to 1.
        alignment_kl_P: k_t [P] in nats.
        deficit_P: g_t [P], 0 to 1.
        student_mass_P: Student probability on B_t [P], 0 to 1.
        aligned_student_kl_P: KL(p_a || p_s) [P] in nats: how far the student is from aligned where it is penalised.
        top_token_PK: The K likeliest tokens of B_t under base, int64 [P, top_tokens]; -1 where B_t holds fewer.
        top_mass_PK: Their p_b [P, top_tokens]; 0 where B_t holds fewer.
    """

    total: Tensor
    anchor: Tensor
    recovery: Tensor
    penalty: Tensor
    row_loss_N: Tensor
    base_favored_mass_P: Tensor
    alignment_kl_P: Tensor
    deficit_P: Tensor
    student_mass_P: Tensor
    aligned_student_kl_P: Tensor = field(default_factory=lambda: torch.empty(0))
    top_token_PK: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    top_mass_PK: Tensor = field(default_factory=lambda: torch.empty(0, 0))


def needs_base(kind_N: Tensor, settings: LossSettings) -> Tensor:
    """Which rows need hidden states of base: penalty rows, and every row under a contrastive teacher.

    Args:
        kind_N: `TokenKind` of each row [N].
        settings: Decides by its alpha.

    Returns:
        Boolean [N], on the device of `kind_N`.
    """
    return torch.ones_like(kind_N, dtype=torch.bool) if settings.alpha > 0 else kind_N == TokenKind.PENALTY
