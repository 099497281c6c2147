"""Helpfulness as a constraint: the anchor's weight as a Lagrange multiplier.

Training minimises recovery and penalty subject to divergence(aligned, student) <= budget on anchor tokens. Dual ascent
on the multiplier of that constraint is the weight of the anchor. The rule is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

import math
from typing import Any

from raycomplete.config import ConstraintConfig
from raycomplete.runtime.errors import NotFiniteError

_MEMORY = 0.8  # of the running mean; one step's anchor tokens alone are noisy
_LARGEST_BREACH = 3.0  # a single wild step must not throw the weight to its bound


class AnchorMultiplier:
    """w <- clip(w * exp(rate * (min(d / budget, 3) - 1)), w0, max_weight), with d the running anchor divergence.

    The weight never falls below where it started: below its budget the anchor still shapes what the student does.
    Without a budget it stays at its start.

    Args:
        config: Budget in nats a token, rate and bound.
        start: w0, `train.weights.anchor`.
    """

    def __init__(self, config: ConstraintConfig, start: float) -> None:
        self._config = config
        self._start = start
        self.weight = start
        self._divergence: float | None = None

    @property
    def factor(self) -> float:
        """What the anchor's weight in the run file is multiplied by."""
        return self.weight / self._start if self._start > 0 else 1.0

    def update(self, divergence: float) -> None:
        """Takes in the mean anchor divergence of a step in nats a token.

        Raises:
            NotFiniteError: It is NaN or infinite.
        """
        if not math.isfinite(divergence):
            raise NotFiniteError(f"The anchor divergence is not finite: {divergence}.", "Lower train.lr.")
        old = divergence if self._divergence is None else self._divergence
        self._divergence = _MEMORY * old + (1 - _MEMORY) * divergence
        if self._config.kl_budget is None:
            return
        breach = min(self._divergence / self._config.kl_budget, _LARGEST_BREACH) - 1
        grown = self.weight * math.exp(self._config.rate * breach)
        self.weight = min(max(grown, self._start), max(self._config.max_weight, self._start))

    def state_dict(self) -> dict[str, Any]:
        """Weight and running mean, as plain JSON types."""
        return {"weight": self.weight, "divergence": self._divergence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved run."""
        self.weight, self._divergence = float(state["weight"]), state["divergence"]
