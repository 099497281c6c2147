"""Suffix by random search (Andriushchenko et al., arXiv 2404.02151), without gradients: the mark that GCG must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.registry import register
from raycomplete.attacks.suffix import IntArray, Search, SuffixConfig, SuffixSearch, losses_of
from raycomplete.attacks.target import Target, WhiteBox
from raycomplete.attacks.trial import Trial, TrialCost

if TYPE_CHECKING:
    import numpy as np


class RandomSearchConfig(SuffixConfig):
    """Suffix by random search (Andriushchenko et al., arXiv 2404.02151), with as many queries as GCG by default."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "queries": 500 * 512}

    name: Literal["random_search"] = "random_search"
    queries: int = Field(500 * 512, ge=1, le=1_000_000, description="candidates whose loss is asked for")
    batch: int = Field(64, ge=1, description="candidates of one step, the best of which is kept if it is better")
    changes: int = Field(4, ge=1, description="tokens that one candidate changes at most")


@register(RandomSearchConfig)
class RandomSearchAttack(SuffixSearch[RandomSearchConfig]):
    """Searches by chance: candidates change a few neighbouring tokens; the best of a batch is kept if it is better."""

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        plain = super().cost(trials)
        return replace(plain, passes=plain.trials * (1 + ceil(self.config.queries / self.config.batch)))

    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        import numpy as np

        while found.queries < self.config.queries:
            target.stop_if_cancelled()
            count = min(self.config.batch, self.config.queries - found.queries)
            drawn = [self._changed(found.best, usable, rng) for _ in range(count)]
            candidates = found.surviving(drawn) or [found.best]
            losses = losses_of(box, found, candidates, self.config.batch)
            best = int(np.argmin(losses))
            if losses[best] < found.best_loss:
                found.note(candidates[best], losses[best])
            else:
                found.note(found.best, found.best_loss)

    def _changed(self, suffix: tuple[int, ...], usable: IntArray, rng: np.random.Generator) -> tuple[int, ...]:
        count = int(rng.integers(1, min(self.config.changes, len(suffix)) + 1))
        start = int(rng.integers(len(suffix) - count + 1))
        return (*suffix[:start], *rng.choice(usable, size=count).tolist(), *suffix[start + count :])
