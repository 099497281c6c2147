"""Words of the loss: kinds of token rows, its settings, its result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from raycomplete.config import TrainConfig


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
        chunk_tokens: Rows whose logits exist at a time.

    Raises:
        ValueError: On construction, where a value is out of range.
    """

    anchor: float = 1.0
    recovery: float = 1.0
    penalty: float = 0.1
    tau: float = 0.01
    kappa: float = 0.5
    alpha: float = 0.0
    plausibility: float = 0.1
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.kappa <= 0 or self.alpha < 0 or self.chunk_tokens < 1:
            raise ValueError(f"kappa must be positive, alpha not negative, chunk_tokens at least 1, got {self}.")
        if not 0 <= self.tau <= 1 or not 0 < self.plausibility <= 1:
            raise ValueError(f"tau must be within [0, 1] and plausibility within (0, 1], got {self}.")

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
        )

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
        row_loss_N: KL(q || p_s) in nats, or the penalty g_t * sum over B_t of p_s(v)^2, unweighted [N].
        base_favored_mass_P: m_t [P], 0 to 1.
        trained_depth_P: k_t [P] in nats.
        deficit_P: g_t [P], 0 to 1.
        student_mass_P: Student probability on B_t [P], 0 to 1.
    """

    total: Tensor
    anchor: Tensor
    recovery: Tensor
    penalty: Tensor
    row_loss_N: Tensor
    base_favored_mass_P: Tensor
    trained_depth_P: Tensor
    deficit_P: Tensor
    student_mass_P: Tensor


def needs_base(kind_N: Tensor, settings: LossSettings) -> Tensor:
    """Which rows need hidden states of base: penalty rows, and every row under a contrastive teacher.

    Args:
        kind_N: `TokenKind` of each row [N].
        settings: Decides by its alpha.

    Returns:
        Boolean [N], on the device of `kind_N`.
    """
    return torch.ones_like(kind_N, dtype=torch.bool) if settings.alpha > 0 else kind_N == TokenKind.PENALTY
