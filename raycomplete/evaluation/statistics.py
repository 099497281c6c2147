"""Intervals for rates and for differences between models. Every published rate carries one.

Single variants use Wilson's score interval, which stays inside [0, 1] and keeps its coverage where a rate is near 0 or
1, as attack success rates of a finished model are. The mean over depths needs more care: the same prompts recur at
every depth, so its trials are not independent, and treating them as such would make the interval too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from raycomplete.runtime.types import Rate

RESAMPLES = 10_000
_BLOCK = 1_000  # resamples that exist at a time


def wilson(successes: int, n: int, confidence: float = 0.95) -> Rate:
    """Computes a share with its Wilson score interval.

    Args:
        successes: Trials that counted, 0 <= successes <= n.
        n: All trials. With n = 0 nothing is known: the rate is 0 by convention and the interval is 0 to 1.
        confidence: Two-sided coverage of the interval.

    Raises:
        ValueError: The counts or the confidence are out of range.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}.")
    return wilson_share(successes / n if n else 0.0, n, n, confidence)


def wilson_share(rate: float, n: int, effective: float, confidence: float = 0.95) -> Rate:
    """Computes Wilson's interval of a rate that was seen on `effective` independent trials; `n` is only recorded."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    if effective <= 0:
        return Rate(rate=0.0, n=0, low=0.0, high=1.0)
    z = float(norm.ppf(0.5 + confidence / 2.0))
    shrink = 1.0 + z * z / effective
    center = (rate + z * z / (2.0 * effective)) / shrink
    half = z * np.sqrt(rate * (1.0 - rate) / effective + z * z / (4.0 * effective**2)) / shrink
    # Rounding may push the ends past the rate itself at 0 and 1, where they are exact.
    low = 0.0 if rate == 0.0 else max(0.0, float(center - half))
    high = 1.0 if rate == 1.0 else min(1.0, float(center + half))
    return Rate(rate=float(rate), n=n, low=low, high=high)


def mean_over_trials(complied: Sequence[Sequence[bool]]) -> Rate:
    """Computes the mean attack success rate of behaviours that were tried several times, with an interval over them.

    The unit of sampling is the behaviour: each contributes its share of trials at which the attack worked, and weighs
    the same. The variance of the mean is the variance of those N shares over N. It is turned into an effective number
    of trials, n_eff = p (1 - p) / variance, and the interval is Wilson's at n_eff. n_eff is kept between N (a
    behaviour comes out alike in all trials) and the number of trials (independent). At a rate of 0 or 1, where nothing
    can be seen of the dependence, n_eff = N, the cautious end. The interval is deterministic.

    Args:
        complied: For each of N behaviours, whether the attack worked in each of its trials; `n` of the result is N.

    Raises:
        ValueError: A behaviour has no trial.
    """
    if any(len(trials) == 0 for trials in complied):
        raise ValueError("mean_over_trials needs at least one trial of every behaviour.")
    n = len(complied)
    if n == 0:
        return wilson(0, 0)
    share_N = np.asarray([sum(trials) / len(trials) for trials in complied])
    num_trials = sum(map(len, complied))
    rate = float(share_N.mean())
    spread = rate * (1.0 - rate)
    variance = float(share_N.var(ddof=1)) / n if n > 1 else 0.0
    if spread <= 0.0 or n == 1:
        effective = float(n)
    elif variance <= 0.0:
        effective = float(num_trials)
    else:
        effective = min(max(spread / variance, float(n)), float(num_trials))
    return wilson_share(rate, n, effective)


def mean_over_depths(complied_DN: Sequence[Sequence[bool]]) -> Rate:
    """Computes the mean attack success rate over D depths, as `mean_over_trials`: each of N prompts has D trials.

    The interval says nothing about depths that were not measured.

    Raises:
        ValueError: No depth is given, or the depths hold different numbers of prompts.
    """
    if not complied_DN or len({len(row) for row in complied_DN}) != 1:
        raise ValueError("mean_over_depths needs at least one depth, and the same prompts at every depth.")
    return mean_over_trials(list(zip(*complied_DN, strict=True)))


def worst_of_trials(complied: Sequence[Sequence[bool]]) -> Rate:
    """Computes the share of behaviours at which a trial worked: the rate of an attacker who tries them all."""
    return wilson(sum(any(trials) for trials in complied), len(complied))


def bootstrap(num_items: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Draws items with replacement, the same ones each time; yields indices, [resamples of a block, items]."""
    generator = np.random.default_rng(0)
    for start in range(0, resamples, _BLOCK):
        yield generator.integers(num_items, size=(min(_BLOCK, resamples - start), num_items))


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two models' mean rates, first minus second, with its 95 % interval.

    `n` counts the behaviours that both models were asked, `resamples` the bootstrap samples behind the interval.
    """

    difference: float
    low: float
    high: float
    n: int
    resamples: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_bootstrap(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = RESAMPLES
) -> Difference:
    """Compares two models by the share of trials at which the attack worked on each behaviour.

    Behaviours are drawn with replacement, each with both models' results, so that a behaviour that is easy for both
    does not widen the interval. The interval is the percentile one. Where all behaviours differ alike (both models
    refuse everything) it has no width, which says that nothing was seen to vary and not that the models are equal.

    Raises:
        ValueError: The two have no behaviour in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("paired_bootstrap needs behaviours that both models were asked.")
    difference_N = np.asarray([first[name] - second[name] for name in common])
    means = [difference_N[drawn_RN].mean(axis=1) for drawn_RN in bootstrap(len(common), resamples)]
    tail = (1.0 - 0.95) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Difference(float(difference_N.mean()), float(low), float(high), len(common), resamples)
