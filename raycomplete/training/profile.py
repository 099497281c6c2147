"""The position profile of the student in training, on held-out harmful prompts with compliant continuations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raycomplete.core.loss_types import LossSettings
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.feed import ScoreFeed, ScoreSource
from raycomplete.training.plan import AnchorItem, StepPlan
from raycomplete.training.samples import AnchorSample

_NAMES = ("base_favored_mass", "kl_to_base", "deficit")


def measure_profile(
    engine: Any, samples: Sequence[AnchorSample], sources: Mapping[str, ScoreSource], micro_batch: int
) -> dict[str, list[float]]:
    """Means over prompts of mass, KL(student || base) and deficit at each position.

    Every rank computes the same numbers: under ZeRO-3 a forward pass needs all of them anyway.

    Returns:
        Lists by position for each name, and "n": prompts that reach the position.
    """
    feed = ScoreFeed(sources, max_depth=0, penalty=False, contrastive=True)
    feed.request(0, samples, [])
    scores = feed.take(0)
    builder = BatchBuilder(penalty=False, contrastive=True, scale=1.0)
    size = max(len(sample.answer_ids) for sample in samples)
    sums_3T = torch.zeros(len(_NAMES), size, dtype=torch.float64)
    count_T = torch.zeros(size, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for start in range(0, len(samples), micro_batch):
            items = [AnchorItem(sample) for sample in samples[start : start + micro_batch]]
            batch = builder.build(items, StepPlan(tuple(items), ()), scores).to(engine.device)
            measured_3N = torch.stack([row_N.double().cpu() for row_N in engine(batch, "profile")])
            position_N = torch.cat([torch.arange(len(item.sample.answer_ids)) for item in items])
            sums_3T.index_add_(1, position_N, measured_3N)
            count_T.index_add_(0, position_N, torch.ones(position_N.numel(), dtype=torch.float64))
    engine.train()
    means_3T = sums_3T / count_T.clamp(min=1)
    profile = {name: means_3T[index].tolist() for index, name in enumerate(_NAMES)}
    return profile | {"n": count_T.tolist()}


def write_profile(path: Path, who: str, profile: dict[str, list[float]], settings: LossSettings) -> None:
    """Adds one model's profile to profile.json, atomically."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    content |= {
        "positions": list(range(len(profile["n"]))),
        "tau": settings.tau,
        "kappa": settings.kappa,
        who: profile,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
