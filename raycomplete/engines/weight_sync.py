"""Whether the engines speak as the trainer does once they have its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from raycomplete.engines.weights import Weights
from raycomplete.runtime.errors import WorkError

# Mean over the probe's tokens of |log p - log p'|, in nats. float32: rounding only, 6e-6 on SmolLM2-135M on a CPU; GPU
# kernels may round products to TF32. bfloat16: engine and trainer round to 8 bits after different kernels in every
# layer; on SmolLM2-135M 0.02 where tokens are likely, 0.04 on samples at temperature 1, 0.05 on unlikely tokens. A
# stale head costs more than a nat. What one small step changes stays below either, so this proves that the tensors
# arrived whole, not which of two neighbouring versions they are: the engine's stamp does that.
DEFAULT_TOLERANCE: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.1}


class SyncError(WorkError):
    """After an update of the weights, an engine's log-probabilities differ from the trainer's."""


@dataclass(frozen=True)
class SyncReport:
    """One update of the weights of all engines, and how far they are from the trainer since.

    Attributes:
        version: Of the weights.
        seconds: From the call until the last engine had answered the probe.
        load_s: The slowest engine's time for loading; 0 where all had these weights already.
        num_bytes: Size of the payload.
        mean_abs_difference: Mean over the probe's tokens of |log p - log p'|, nats; of the engine that is farthest off.
        max_abs_difference: The largest of those over all engines, nats.
        num_tokens: Tokens that each engine was compared on.
        tolerance: What `mean_abs_difference` was held to.
    """

    version: int
    seconds: float
    load_s: float
    num_bytes: int
    mean_abs_difference: float
    max_abs_difference: float
    num_tokens: int
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for the run folder."""
        return asdict(self)


def compare(
    log_probs: Sequence[Tensor],
    expected_N: Tensor,
    *,
    names: Sequence[str],
    weights: Weights,
    seconds: float,
    load_s: float,
    tolerance: float,
) -> SyncReport:
    """The report of an update, from every engine's log-probabilities of the same N tokens and the trainer's own.

    Raises:
        SyncError: The mean difference of an engine exceeds the tolerance, or is not a number.
    """
    differences_EN = (torch.stack(list(log_probs)).double() - expected_N).abs()
    means_E = differences_EN.mean(dim=1)
    report = SyncReport(
        version=weights.version,
        seconds=seconds,
        load_s=load_s,
        num_bytes=weights.num_bytes,
        mean_abs_difference=float(means_E.max()),
        max_abs_difference=float(differences_EN.max()),
        num_tokens=len(expected_N),
        tolerance=tolerance,
    )
    if not report.mean_abs_difference <= tolerance:  # written so that NaN fails too
        raise SyncError(
            f"After loading version {weights.version}, the {names[int(means_E.argmax())]} differs from the trainer by "
            f"{report.mean_abs_difference:.3g} nats on average over {report.num_tokens} tokens (at most "
            f"{report.max_abs_difference:.3g}; tolerance {tolerance:.3g}).",
            "The engine does not hold the trainer's weights, or computes otherwise; rollouts would come from another "
            "model. If the difference is rounding, raise rollout.sync_tolerance.",
        )
    return report
