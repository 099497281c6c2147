"""Intervals for rates and for differences between models. Every published rate carries one.

Single variants use Wilson's score interval, which stays inside [0, 1] and keeps its coverage where a rate is near 0 or
1, as attack success rates of a finished model are. The mean over depths needs more care: the same prompts recur at
every depth, so its trials are not independent, and treating them as such would make the interval too narrow. Two models
are compared prompt by prompt, by a bootstrap over prompts. The coverage of both was simulated
(docs/notes/measurements.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from raycomplete.runtime.types import Rate

RESAMPLES = 10_000
# Prompts added in mind whose trials all come out alike. Without them intervals hold the truth in .88 to .91 of cases
# where .01 of the trials of 100 prompts at 10 depths succeed with a correlation of .7 or .9; with two, in .95 or more.
ALIKE_PROMPTS = 2
_UPPER = 0.975  # quantile at the upper end of an interval of 95 %
_BLOCK = 1_000  # resamples that exist at a time


def wilson(successes: int, n: int) -> Rate:
    """Computes a share with its Wilson score interval of 95 %; nothing is known for n = 0: rate 0, interval 0 to 1."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}.")
    return wilson_share(successes / n if n else 0.0, n, n)


def wilson_share(rate: float, n: int, effective: float, df: float = math.inf) -> Rate:
    """Computes Wilson's interval of a rate that was seen on `effective` independent trials; `n` is only recorded.

    Where the number of trials was estimated from few runs, `df` are the degrees of freedom of Student's t.
    """
    if effective <= 0:
        return Rate(rate=0.0, n=0, low=0.0, high=1.0)
    z = float(stdtrit(df, _UPPER))
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
    the same. The variance of the N shares, over p (1 - p), says how alike the trials of a behaviour come out: 1 where
    all of them do, the mean of 1 / trials where they are independent; it is kept between the two. Only behaviours
    with a success tell (with a failure, where those are fewer), so with K of them the likeness is drawn towards 1 by
    `ALIKE_PROMPTS`: (K likeness + 2) / (K + 2). The interval is Wilson's at N / likeness trials, and deterministic.

    Coverage at 50 to 200 prompts and 5 to 10 depths is .93 to .97 where trials of a prompt are correlated, and .97 to
    1.0 where they are independent and few succeed (docs/notes/measurements.md).
    """
    if any(len(trials) == 0 for trials in complied):
        raise ValueError("mean_over_trials needs at least one trial of every behaviour.")
    n = len(complied)
    if n == 0:
        return wilson(0, 0)
    share_N = np.asarray([sum(trials) / len(trials) for trials in complied])
    least = float(np.mean([1.0 / len(trials) for trials in complied]))
    return wilson_share(float(share_N.mean()), n, n / _likeness(share_N, least))


def _likeness(share_N: np.ndarray, least: float) -> float:
    """Computes how alike the trials of a prompt come out: from `least` for independent ones to 1 for equal ones."""
    n, rate = len(share_N), float(share_N.mean())
    if n == 1 or rate in (0.0, 1.0):
        return 1.0
    likeness = float(np.clip(share_N.var(ddof=1) / (rate * (1.0 - rate)), least, 1.0))
    telling = min(np.count_nonzero(share_N > 0.0), np.count_nonzero(share_N < 1.0))
    return (telling * likeness + ALIKE_PROMPTS) / (telling + ALIKE_PROMPTS)


def worst_of_trials(complied: Sequence[Sequence[bool]]) -> Rate:
    """Computes the share of behaviours at which a trial worked: the rate of an attacker who tries them all."""
    return wilson(sum(any(trials) for trials in complied), len(complied))


def bootstrap(num_items: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Draws items with replacement, the same ones each time; yields indices, [resamples of a block, items]."""
    generator = np.random.default_rng(0)
    for start in range(0, resamples, _BLOCK):
        yield generator.integers(num_items, size=(min(_BLOCK, resamples - start), num_items))


def paired_bootstrap(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Compares two models by their shares of successful trials (0 to 1) on each prompt: first minus second, 95 %.

    Prompts are drawn with replacement, each with all trials of both models, so that a prompt that is easy for both does
    not widen the interval. Two prompts are added before drawing, one at which only the first model succeeds and one at
    which only the second does: without them the interval has no width where both models refuse everything, and it
    covers .63 where 50 prompts differ at 2 of 100. The interval is the percentile one, and the same at every call.

    Source of the two prompts: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", Journal of Educational and Behavioral Statistics 37 (2012).
    """
    there_N = np.subtract(*_paired(first, second))
    n = len(there_N) - 2
    back_N = np.append(there_N[:n], there_N[:-3:-1])  # the added two exchanged, so that no model comes first by chance
    draws = bootstrap(n + 2, (resamples + 1) // 2)
    means = [items_N[drawn_RN].mean(axis=1) for drawn_RN in draws for items_N in (there_N, back_N)]
    difference, low, high = _around(float(there_N[:n].mean()), np.concatenate(means))
    return {"difference": difference, "low": low, "high": high, "n": n, "resamples": resamples}


def paired_reduction(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any] | None:
    """Computes by how much the first model's mean rate is lower, as a share of the second's, with its 95 % interval.

    The bootstrap is that of `paired_bootstrap`."""
    first_N, second_N = _paired(first, second)
    n = len(first_N) - 2
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 1.0 - float(first_N[:n].sum() / second_N[:n].sum())
        draws = [1.0 - first_N[drawn_RN].sum(axis=1) / second_N[drawn_RN].sum(axis=1) for drawn_RN in bootstrap(n + 2)]
        reduction, low, high = _around(value, np.nan_to_num(np.concatenate(draws), nan=-np.inf, neginf=-np.inf))
    return {"reduction": reduction, "low": low, "high": high, "n": n} if np.isfinite([reduction, low]).all() else None


def _around(value: float, draws: np.ndarray) -> tuple[float, float, float]:
    """Returns a value with its 95 % percentile interval, which holds it."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return value, min(float(low), value), max(float(high), value)


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns both models' shares on the N common prompts, and the two added ones at the end, [N + 2] each."""
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("A paired bootstrap needs prompts that both models were asked.")
    first_N, second_N = ([shares[name] for name in common] for shares in (first, second))
    return np.asarray([*first_N, 1.0, 0.0]), np.asarray([*second_N, 0.0, 1.0])


def mean_over_runs(shares: Sequence[Mapping[str, float]], trials: float = 1) -> dict[str, Any]:
    """Computes the mean rate of R runs that differ in their seed, with an interval over prompts and seeds.

    The variance of the mean is the sum of two: that over prompts of their mean over runs, as in `mean_over_trials`, and
    that over runs of their mean over prompts. Their interaction is in both, so the sum errs on the wide side. The
    interval is Wilson's at p (1 - p) / variance trials, with Student's t in place of the normal quantile at the degrees
    of freedom of Satterthwaite (Biometrics Bulletin 2, 1946): runs that differ widen it a lot where they are few. It
    holds the truth in .94 or more of cases with 5 runs, .92 with 3 and .89 with 2, at rates up to .1
    (docs/notes/measurements.md)."""
    share_RN = _over_runs(shares)
    (runs, n), rate = share_RN.shape, float(np.clip(share_RN.mean(), 0.0, 1.0))
    of_prompts = rate * (1.0 - rate) * _likeness(share_RN.mean(axis=0), 1.0 / (runs * trials)) / n
    variance, df = _with_runs(of_prompts, n, share_RN)
    effective = rate * (1.0 - rate) / variance if variance > 0.0 else n
    return wilson_share(rate, n, effective, df=df).to_json() | _spread(share_RN)


def difference_over_runs(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Compares two models run by run and prompt by prompt, with an interval over prompts and seeds.

    The variances are those of `mean_over_runs`, of the differences at each prompt; the two prompts of
    `paired_bootstrap` are added to those over which the first is taken. The interval is the mean with Student's t."""
    pairs = [
        {name: ours[name] - theirs[name] for name in ours.keys() & theirs.keys()}
        for ours, theirs in zip(first, second, strict=True)
    ]
    difference_RN = _over_runs(pairs)
    n, mean = difference_RN.shape[1], float(difference_RN.mean())
    with_added = np.append(difference_RN.mean(axis=0), [1.0, -1.0])
    variance, df = _with_runs(float(with_added.var()) / (n + 2), n + 2, difference_RN)
    half = float(stdtrit(df, 0.975)) * math.sqrt(variance)
    interval = {"low": max(mean - half, -1.0), "high": min(mean + half, 1.0)}
    return {"difference": mean, "n": n, **interval, **_spread(difference_RN)}


def _over_runs(shares: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Returns what every run has, in one order of prompts, [R, N]."""
    common = sorted(set.intersection(*(set(run) for run in shares))) if shares else []
    if not common:
        raise ValueError("Runs can be compared only on prompts that all of them have.")
    return np.asarray([[run[name] for name in common] for run in shares], dtype=np.float64)


def _with_runs(of_prompts: float, n: int, value_RN: np.ndarray) -> tuple[float, float]:
    """Adds the variance over runs to that over n prompts; returns the sum and its degrees of freedom."""
    runs = len(value_RN)
    of_runs = float(value_RN.mean(axis=1).var(ddof=1)) / runs if runs > 1 else 0.0
    if of_runs <= 1e-15:  # nothing but rounding
        return of_prompts, math.inf
    variance = of_prompts + of_runs
    return variance, variance**2 / (of_runs**2 / (runs - 1) + of_prompts**2 / max(n - 1, 1))


def _spread(value_RN: np.ndarray) -> dict[str, Any]:
    value_R = value_RN.mean(axis=1)
    sd = float(value_R.std(ddof=1)) if len(value_R) > 1 else 0.0
    return {"runs": len(value_R), "sd": sd, "min": float(value_R.min()), "max": float(value_R.max())}
