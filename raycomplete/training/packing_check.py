"""Whether the student keeps packed sequences apart; some model families do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycomplete.config import Dtype
from raycomplete.data.samples import AnchorSample
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.step_plan import AnchorItem, StepPlan

# Mean |log p - log p'| in nats. Another batch shape moves bfloat16 by hundredths; a neighbour's words by whole nats.
_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.15}


def keeps_sequences_apart(engine: Any, sample: AnchorSample, dtype: Dtype) -> bool:
    """Reads a sequence whole and its two halves packed into one row, and each of the three in a row of its own.

    Models that ignore positions when they build their mask, and recurrent ones, let the second half see the first.
    Every rank must call this.

    Args:
        engine: DeepSpeed engine around the student.
        sample: Any; its tokens are read, whatever they mean.
        dtype: Of the student's weights.

    Returns:
        Whether log-probabilities are the same both ways, up to rounding.
    """
    tokens = sample.prompt_ids + sample.answer_ids
    half = len(tokens) // 2
    pieces = [piece for piece in (tokens, tokens[:half], tokens[half:]) if len(piece) > 1]
    packed_N, alone_N = (_log_probs(engine, pieces, packed=packed) for packed in (True, False))
    return float((packed_N - alone_N).abs().mean()) <= _TOLERANCE[dtype]


def _log_probs(engine: Any, pieces: list[tuple[int, ...]], *, packed: bool) -> Tensor:
    items = [AnchorItem(AnchorSample("probe", piece[:1], piece[1:])) for piece in pieces]
    builder = BatchBuilder(penalty=False, contrastive=False, scale=1.0, packed=packed)
    batch = builder.build(items, StepPlan(tuple(items), ()), None)
    engine.eval()
    with torch.no_grad():
        (log_probs_N,) = engine(batch.to(engine.device), "log_probs")
    engine.train()
    return torch.as_tensor(log_probs_N).float().cpu()
