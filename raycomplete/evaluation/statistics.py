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
        confidence: Two-sided coverage of the interval, here and below.

    Raises:
        ValueError: The counts or the confidence are out of range.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}.")
    return _wilson(successes / n if n else 0.0, n, n, confidence)


def wilson_share(share: float, n: int, confidence: float = 0.95) -> Rate:
    """Computes the same for a share of trials that count for less than one each; `n` counts independent ones."""
    return _wilson(share, n, n, confidence)


def mean_over_depths(complied_DN: Sequence[Sequence[bool]], confidence: float = 0.95) -> Rate:
    """Computes the mean attack success rate over depths, with an interval over prompts.

    The unit of sampling is the prompt: each contributes its share of depths at which the attack worked, and the
    variance of the mean is the variance of those N shares over N. That variance is turned into an effective number of
    trials, n_eff = p (1 - p) / variance, and the interval is Wilson's at n_eff. n_eff is kept between N (a prompt
    behaves alike at all depths) and N times the depths (independent). At a rate of 0 or 1, where nothing can be seen of
    the dependence, n_eff = N, the cautious end. The interval is deterministic; it says nothing about depths that were
    not measured.

    Args:
        complied_DN: For each of D depths, whether the attack worked on each of the same N prompts in the same order.

    Returns:
        The mean with `n` = N, the number of prompts.

    Raises:
        ValueError: No depth is given, or the depths hold different numbers of prompts.
    """
    if not complied_DN or len({len(row) for row in complied_DN}) != 1:
        raise ValueError("mean_over_depths needs at least one depth, and the same prompts at every depth.")
    table_DN = np.asarray(complied_DN, dtype=np.float64)
    return _clustered(table_DN.mean(axis=0), table_DN.size, confidence)


def mean_over_trials(complied: Sequence[Sequence[bool]], confidence: float = 0.95) -> Rate:
    """Computes the mean attack success rate of behaviours that were tried several times, with an interval over them.

    As `mean_over_depths`, for any number of trials a behaviour; every behaviour weighs the same.

    Args:
        complied: For each of N behaviours, whether the attack worked in each of its trials; at least one trial each.

    Raises:
        ValueError: A behaviour has no trial.
    """
    if any(len(trials) == 0 for trials in complied):
        raise ValueError("mean_over_trials needs at least one trial of every behaviour.")
    share_N = np.asarray([np.mean(np.asarray(trials, dtype=np.float64)) for trials in complied])
    return _clustered(share_N, sum(map(len, complied)), confidence)


def worst_of_trials(complied: Sequence[Sequence[bool]], confidence: float = 0.95) -> Rate:
    """Computes the share of behaviours at which a trial worked: the rate of an attacker who tries them all."""
    return wilson(sum(any(trials) for trials in complied), len(complied), confidence)


def bootstrap(num_items: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws items with replacement; yields indices of the draws, [resamples of a block, items]."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        yield generator.integers(num_items, size=(min(_BLOCK, resamples - start), num_items))


def _clustered(share_N: np.ndarray, num_trials: int, confidence: float) -> Rate:
    """Computes the mean share of N independent prompts with Wilson's interval at an effective number of trials."""
    num_prompts = len(share_N)
    if num_prompts == 0:
        return wilson(0, 0, confidence)
    rate = float(share_N.mean())
    spread = rate * (1.0 - rate)
    variance = float(share_N.var(ddof=1)) / num_prompts if num_prompts > 1 else 0.0
    if spread <= 0.0 or num_prompts == 1:
        effective = float(num_prompts)
    elif variance <= 0.0:
        effective = float(num_trials)
    else:
        effective = min(max(spread / variance, float(num_prompts)), float(num_trials))
    return _wilson(rate, num_prompts, effective, confidence)


def _wilson(rate: float, n: int, effective: float, confidence: float) -> Rate:
    """Computes Wilson's interval of a rate that was seen on `effective` independent trials."""
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
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compares two models behaviour by behaviour.

    Behaviours are drawn with replacement, each with both models' results, so that a behaviour that is easy for both
    does not widen the interval. The interval is the percentile one. Where all behaviours differ alike (both models
    refuse everything) it has no width, which says that nothing was seen to vary and not that the models are equal.

    Args:
        first: Share of trials at which the attack worked, by behaviour.
        second: The same for the other model.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling; the same input gives the same interval.

    Raises:
        ValueError: The two have no behaviour in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("paired_bootstrap needs behaviours that both models were asked.")
    difference_N = np.asarray([first[name] - second[name] for name in common])
    means = [difference_N[drawn_RN].mean(axis=1) for drawn_RN in bootstrap(len(common), resamples, seed)]
    tail = (1.0 - 0.95) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Difference(float(difference_N.mean()), float(low), float(high), len(common), resamples)
