"""Any-depth alignment (ADA), arXiv 2510.18081: an answer is looked at again after every few of its tokens.

Behind the first d tokens of an answer, prefill included, the turn is ended and the header that begins an answer is
written once more, where the model was trained to decide. Re-asking lets it go on from there and looks for a refusal;
the probe reads one inner state. Facts are from the authors' code (javyduck/any-depth-alignment). An answer that is
refused at any depth is replaced as a whole, as by a server that has not shown it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from raycomplete.runtime.types import Generator

Check = Callable[[Sequence[Sequence[int]]], list[list[int] | None]]
"""Says of each context, which ends with the header of an answer, what refuses it; None where nothing does."""
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Passes:
    """Forward passes of a model of the target's size, and tokens that were said for them."""

    passes: int = 0  # one for each token that a model wrote, and one for each context that was read again
    tokens: int = 0  # of the answers as they were given


class AnyDepthGenerator:
    """A generator whose answers are looked at again at every depth (implements `Generator`)."""

    def __init__(
        self,
        generator: Generator,
        end: Sequence[int],
        header: Sequence[int],
        every: int,
        check: Check,
        *,
        max_length: int,
        spare: int,
        passes: Passes,
    ) -> None:
        self._generator, self._end, self._header, self._every = generator, tuple(end), tuple(header), every
        self._check, self._longest, self._passes = check, max_length - spare, passes

    def generate(self, sequences: Sequence[Sequence[int]], *, max_tokens: int, **sampling: Any) -> list[list[int]]:
        answers = self._generator.generate(sequences, max_tokens=max_tokens, **sampling)
        self._passes.passes += sum(map(len, answers))
        contexts = [self.contexts(sequence, answer) for sequence, answer in zip(sequences, answers, strict=True)]
        flat = [context for found in contexts for context in found]
        verdicts = iter(self._check(flat) if flat else ())
        for index, found in enumerate(contexts):
            refusals = [refusal for refusal in (next(verdicts) for _ in found) if refusal is not None]
            if refusals:
                answers[index] = refusals[0][:max_tokens]
        self._passes.passes += len(flat)
        self._passes.tokens += sum(map(len, answers))
        return answers

    def contexts(self, sequence: Sequence[int], answer: Sequence[int]) -> list[list[int]]:
        """The sequences that are looked at: for every d the prompt, d tokens of the answer, its end, and the header."""
        start = _end_of_last(self._header, sequence)
        said = [*sequence[start:], *answer]
        found = [
            [*sequence[:start], *said[:depth], *self._end, *self._header]
            for depth in range(self._every, len(said) + 1, self._every)
        ]
        return [context for context in found if len(context) <= self._longest]


def _end_of_last(part: Sequence[int], sequence: Sequence[int]) -> int:
    """Position behind the last place at which a part stands; the end of the sequence where it stands nowhere."""
    size, whole = len(part), tuple(sequence)
    starts = range(len(whole) - size, -1, -1)
    return next((start + size for start in starts if whole[start : start + size] == tuple(part)), len(whole))


def re_asking(
    generator: Generator,
    decode: Callable[[Sequence[int]], str],
    refuses: Callable[[str], bool],
    max_tokens: int,
    passes: Passes,
) -> Check:
    """Makes the check that lets the model begin its answer anew, greedily, and looks for a refusal."""

    def check(contexts: Sequence[Sequence[int]]) -> list[list[int] | None]:
        said = generator.generate(contexts, max_tokens=max_tokens)
        passes.passes += sum(map(len, said))
        return [tokens if refuses(decode(tokens)) else None for tokens in said]

    return check


@dataclass(frozen=True)
class Probe:
    """A logistic regression on inner states."""

    weight_H: FloatArray
    bias: float

    def probability(self, state_NH: FloatArray) -> FloatArray:
        """Probability of harm of each state, [N]."""
        return np.asarray(expit(state_NH @ self.weight_H + self.bias))


def fit_probe(state_NH: FloatArray, harmful_N: Sequence[bool], *, c: float = 1.0, max_steps: int = 1000) -> Probe:
    """Fits a balanced L2-regularised logistic regression: the same minimum as scikit-learn's with C = c.

    0.5 |w|^2 + c sum_n b_n log(1 + exp(-y_n (w . x_n + bias))), y_n = +-1, b_n = N / (2 times the number of its class).
    """
    target_N = np.where(np.asarray(harmful_N), 1.0, -1.0)
    counts = {side: int((target_N == side).sum()) for side in (1.0, -1.0)}
    if not all(counts.values()):
        raise ValueError("A probe needs states of harmful and of harmless answers.")
    weight_N = c * len(target_N) / (2.0 * np.where(target_N > 0, counts[1.0], counts[-1.0]))
    x_NH = np.asarray(state_NH, dtype=np.float64)

    def loss(theta: FloatArray) -> tuple[float, FloatArray]:
        weight_H, bias = theta[:-1], theta[-1]
        margin_N = target_N * (x_NH @ weight_H + bias)
        slope_N = -weight_N * target_N * expit(-margin_N)
        value = float(0.5 * weight_H @ weight_H + weight_N @ np.logaddexp(0.0, -margin_N))
        return value, np.append(weight_H + x_NH.T @ slope_N, slope_N.sum())

    found = minimize(loss, np.zeros(x_NH.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": max_steps})
    return Probe(found.x[:-1], float(found.x[-1]))
