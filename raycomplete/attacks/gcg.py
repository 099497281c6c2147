"""Greedy coordinate gradient, from the paper (Zou et al., arXiv 2307.15043, algorithm 1, one behaviour at a time).

Each step: the gradient of the target's loss with respect to the one-hot tokens of the suffix gives every position its
`top` most promising substitutes; `search_width` candidates each change one token, positions in even turns; the best of
them becomes the suffix, even where it is worse than the one before. Where this departs from the paper: candidates that
would not survive being typed as text are dropped, and the best suffix of all steps is used in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import MAX_STEPS
from raycomplete.attacks.registry import register
from raycomplete.attacks.suffix import IntArray, Search, SuffixConfig, SuffixSearch, losses_of
from raycomplete.attacks.target import FloatArray, Target, WhiteBox
from raycomplete.attacks.trial import Trial, TrialCost

if TYPE_CHECKING:
    import numpy as np


class GcgConfig(SuffixConfig):
    """Greedy coordinate gradient (Zou et al., arXiv 2307.15043)."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "steps": 500, "search_width": 512, "top": 256}

    name: Literal["gcg"] = "gcg"
    steps: int = Field(500, ge=1, le=MAX_STEPS, description="steps of the search")
    search_width: int = Field(512, ge=1, le=4096, description="candidates of one step")
    top: int = Field(256, ge=1, description="likeliest substitutes of each position by gradient")
    batch: int = Field(64, ge=1, description="candidates of one forward pass")


@register(GcgConfig)
class GcgAttack(SuffixSearch[GcgConfig]):
    """Searches by gradient. `stats` of a response: queries, steps, survivor rate, loss at the start and at best."""

    without_effect = ("batch",)

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        config, plain = self.config, super().cost(trials)
        passes = 1 + config.steps * ceil(config.search_width / config.batch)
        return replace(plain, passes=plain.trials * passes, gradients=plain.trials * config.steps)

    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        import numpy as np

        suffix = found.best
        for step in range(self.config.steps):
            target.stop_if_cancelled()
            gradient_SV = box.suffix_gradient(found.problem, suffix)
            candidates = found.surviving(self.candidates(suffix, gradient_SV, usable, rng, step))
            if not candidates:
                found.note(suffix, found.losses[-1])  # a step without a survivor; the next draws others
                continue
            losses = losses_of(box, found, candidates, self.config.batch)
            best = int(np.argmin(losses))
            suffix = candidates[best]
            found.note(suffix, losses[best])

    def candidates(
        self, suffix: tuple[int, ...], gradient_SV: FloatArray, usable: IntArray, rng: np.random.Generator, step: int
    ) -> list[tuple[int, ...]]:
        """Draws `search_width` suffixes that differ from the current one in one token.

        Where they are fewer than its tokens, other positions have their turn in each step.
        """
        import numpy as np

        top = min(self.config.top, len(usable))
        best_ST = usable[least(gradient_SV[:, usable], top)]
        width = self.config.search_width
        positions = np.arange(width) * len(suffix) // width
        if width < len(suffix):
            positions = (positions + step) % len(suffix)
        picks = rng.integers(top, size=width)
        return [
            (*suffix[:position], int(best_ST[position, pick]), *suffix[position + 1 :])
            for position, pick in zip(positions.tolist(), picks.tolist(), strict=True)
        ]


def least(values_SU: FloatArray, count: int) -> IntArray:
    """Returns the places of the `count` least values of each row, in ascending order, equal ones from left to right.

    The same as the start of a stable argsort, without sorting the rest: .02 instead of .11 s a step at 128k tokens.
    """
    import numpy as np

    bounds_S1 = np.partition(values_SU, count - 1, axis=1)[:, count - 1 : count]
    places = [np.flatnonzero(row_U) for row_U in ~(values_SU > bounds_S1)]
    sorted_SK = [some[np.argsort(row_U[some], kind="stable")] for row_U, some in zip(values_SU, places, strict=True)]
    return np.stack([row_K[:count] for row_K in sorted_SK]).astype(np.int64)
