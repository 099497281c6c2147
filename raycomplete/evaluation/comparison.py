"""Differences between models that answered the same behaviours, by paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
_BLOCK = 1_000  # resamples that exist at a time


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second, with a 95 % interval.

    Attributes:
        difference: Difference of the two mean rates.
        low: Lower end.
        high: Upper end.
        n: Behaviours that both models were asked.
        resamples: Bootstrap samples behind the interval.
    """

    difference: float
    low: float
    high: float
    n: int
    resamples: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_bootstrap(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compares two models behaviour by behaviour.

    Behaviours are drawn with replacement, each with both models' results, so that a behaviour that is easy for both
    does not widen the interval. The interval is the percentile one. Where all behaviours differ alike (both models
    refuse everything) it has no width, which says that nothing was seen to vary and not that the models are equal.

    Args:
        first: Share of trials at which the attack worked, by behaviour.
        second: The same for the other model.
        resamples: Bootstrap samples.
        confidence: Two-sided coverage.
        seed: Of the resampling; the same input gives the same interval.

    Raises:
        ValueError: The two have no behaviour in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("paired_bootstrap needs behaviours that both models were asked.")
    difference_N = np.asarray([first[name] - second[name] for name in common])
    generator = np.random.default_rng(seed)
    means = [
        difference_N[generator.integers(len(common), size=(min(_BLOCK, resamples - start), len(common)))].mean(axis=1)
        for start in range(0, resamples, _BLOCK)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Difference(float(difference_N.mean()), float(low), float(high), len(common), resamples)
