"""Suffix by random search (Andriushchenko et al., arXiv 2404.02151), without gradients: what GCG must beat."""

from __future__ import annotations

import numpy as np

from raycomplete.attacks.settings import RandomSearchAttack
from raycomplete.attacks.suffix import IntArray, Search, SuffixSearch, losses_of
from raycomplete.attacks.target import Target
from raycomplete.attacks.white_box import WhiteBox


class RandomSearch(SuffixSearch[RandomSearchAttack]):
    """One variant. Candidates change a few neighbouring tokens; the best of a batch is kept if it is better."""

    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        while found.queries < self.config.queries:
            target.stop_if_cancelled()
            count = min(self.config.batch, self.config.queries - found.queries)
            drawn = [self._changed(found.best, usable, rng) for _ in range(count)]
            candidates = [ids for ids in drawn if found.survives_text(ids)] or [found.best]
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
