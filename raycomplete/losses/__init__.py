"""The method: base-favored sets, position profile, depth sampler, hybrid teacher and loss.

Imports torch and numpy only; knows nothing of engines, files or clusters.
"""

from raycomplete.diagnosis.rows import DiagnosisRows, DiagnosisSettings, diagnose_rows
from raycomplete.losses.base_favored import (
    base_favored_mask,
    base_favored_mass,
    deficit,
    forward_kl,
    trained_depth,
)
from raycomplete.losses.contrastive import contrastive_log_probs
from raycomplete.losses.heads import Head
from raycomplete.losses.loss import completion_loss
from raycomplete.losses.loss_types import LossOutput, LossSettings, TokenKind, needs_base
from raycomplete.training.depth_sampler import DepthSampler

__all__ = [
    "DepthSampler",
    "DiagnosisRows",
    "DiagnosisSettings",
    "Head",
    "LossOutput",
    "LossSettings",
    "TokenKind",
    "base_favored_mask",
    "base_favored_mass",
    "completion_loss",
    "contrastive_log_probs",
    "deficit",
    "diagnose_rows",
    "forward_kl",
    "needs_base",
    "trained_depth",
]
