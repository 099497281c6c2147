"""Simulated evaluations whose true rate is known, and how often an interval holds it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from raycomplete.runtime.types import Rate

Table = list[list[bool]]
Depths = int | np.ndarray  # of every prompt, or of each


def beta_binomial(
    generator: np.random.Generator,
    rate: float,
    correlation: float,
    num_prompts: int,
    *,
    num_depths: Depths,
    repeats: int,
) -> np.ndarray:
    """Draws successes of each prompt over its depths, [repeats, prompts]: beta-distributed difficulty, then a binomial.

    With beta parameters rate * c and (1 - rate) * c, c = 1 / correlation - 1, any two depths of a prompt have exactly
    the given correlation.
    """
    chance: float | np.ndarray = rate
    if correlation:
        weight = 1.0 / correlation - 1.0
        chance = generator.beta(rate * weight, (1.0 - rate) * weight, size=(repeats, num_prompts))
    return generator.binomial(num_depths, chance, size=(repeats, num_prompts))


def gaussian_copula(
    generator: np.random.Generator,
    rate: float,
    correlation: float,
    num_prompts: int,
    *,
    num_depths: Depths,
    repeats: int,
) -> np.ndarray:
    """Draws successes as `beta_binomial`, from normal difficulties; two depths have the same correlation."""
    if not correlation:
        return generator.binomial(num_depths, rate, size=(repeats, num_prompts))
    at, grid = norm.ppf(rate), np.linspace(-9.0, 9.0, 20_001)
    weight = norm.pdf(grid) / norm.pdf(grid).sum()

    def excess(latent: float) -> float:
        chance = norm.cdf((at + np.sqrt(latent) * grid) / np.sqrt(1.0 - latent))
        return float((weight * chance**2).sum() - rate**2) / (rate * (1.0 - rate)) - correlation

    latent = brentq(excess, 1e-6, 1.0 - 1e-6)
    difficulty = generator.standard_normal((repeats, num_prompts))
    chance = norm.cdf((at + np.sqrt(latent) * difficulty) / np.sqrt(1.0 - latent))
    return generator.binomial(num_depths, chance)


MODELS = {"beta-binomial": beta_binomial, "Gaussian copula": gaussian_copula}


def seeds_and_prompts(
    generator: np.random.Generator, rate: float, luck: float, num_runs: int, *, num_depths: int, repeats: int
) -> np.ndarray:
    """Draws successes of 100 prompts in runs of different seeds, [repeats, runs, prompts].

    The log-odds of a trial are a constant, the prompt's difficulty (normal, standard deviation 2, the same in all runs)
    and the luck of the seed (normal, standard deviation `luck`).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)

    def excess(constant: float) -> float:
        chance = 1.0 / (1.0 + np.exp(-constant - np.hypot(2.0, luck) * nodes))
        return float((weights * chance).sum() / weights.sum()) - rate

    of_prompts = 2.0 * generator.standard_normal((repeats, 1, 100))
    of_seeds = luck * generator.standard_normal((repeats, num_runs, 1))
    log_odds = brentq(excess, -30.0, 30.0) + of_prompts + of_seeds
    return generator.binomial(num_depths, 1.0 / (1.0 + np.exp(-log_odds)))


def coverage(successes: np.ndarray, num_depths: Depths, rate: float, interval: Callable[[Table], Rate]) -> float:
    """Computes how often an interval of tables of trials, prompt by prompt, holds the true rate."""
    held, depths = 0, np.broadcast_to(num_depths, successes.shape[1])
    order = np.lexsort((successes, np.broadcast_to(depths, successes.shape)), axis=1)
    # The order of prompts tells nothing, so tables that agree but for it are asked once.
    tables, times = np.unique(np.take_along_axis(successes, order, axis=1), axis=0, return_counts=True)
    for counts, number in zip(tables, times, strict=True):
        found = interval([[at < count for at in range(of)] for count, of in zip(counts, np.sort(depths), strict=True)])
        held += int(number) * (found.low <= rate <= found.high)
    return held / len(successes)
