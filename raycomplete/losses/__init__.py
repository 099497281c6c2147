"""The method: base-favored sets, position profile, depth sampler, hybrid teacher and loss.

Imports torch and numpy only; knows nothing of engines, files or clusters.
"""

from raycomplete.losses.base_favored import (
    alignment_kl,
    base_favored_mask,
    base_favored_mass,
    deficit,
    forward_kl,
)
from raycomplete.losses.contrastive import contrastive_log_probs
from raycomplete.losses.heads import Head
from raycomplete.losses.loss import distillation_loss
from raycomplete.losses.loss_types import LossOutput, LossSettings, TokenKind, needs_base

__all__ = [
    "Head",
    "LossOutput",
    "LossSettings",
    "TokenKind",
    "alignment_kl",
    "base_favored_mask",
    "base_favored_mass",
    "contrastive_log_probs",
    "deficit",
    "distillation_loss",
    "forward_kl",
    "needs_base",
]
