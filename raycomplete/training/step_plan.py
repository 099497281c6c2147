"""The samples that each step trains, as a pure function of seed, step and sampler state.

Every rank computes the same global plan and takes its slice, so ranks never exchange indices, a resumed run continues
with the very next samples, and the loss does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import AnchorItem, Method, RecoveryItem, TrainSequence
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.packing import deal

S = TypeVar("S", AnchorSample, RecoverySample)
_SEED_TAGS = {"anchor": 11, "recovery": 12, "borderline": 17, "mixture": 18}  # 13 to 16: feedback, on_policy


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The samples of one optimizer step on all workers, and where they are cut."""

    anchor: tuple[AnchorItem, ...]
    recovery: tuple[RecoveryItem, ...]


@dataclass(frozen=True)
class StepSequences:
    """The sequences of one optimizer step on all workers.

    Attributes:
        anchor: Of each anchor item, in their order.
        recovery: Of each recovery item, in their order.
        normalisers: Divisor of the row weights of each term.
    """

    anchor: tuple[tuple[TrainSequence, ...], ...]
    recovery: tuple[tuple[TrainSequence, ...], ...]
    normalisers: dict[str, float]

    @classmethod
    def of(cls, plan: StepPlan, method: Method) -> StepSequences:
        """Asks a method for the sequences of a plan."""
        anchor = tuple(method.sequences(item) for item in plan.anchor)
        recovery = tuple(method.sequences(item) for item in plan.recovery)
        return cls(anchor, recovery, method.normalisers(chain(*anchor, *recovery)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, the last one of each included."""
        return sum(len(sequence.token_ids) for sequence in chain(*self.anchor, *self.recovery))

    def micro_batches(self, rank: int, world_size: int, count: int) -> list[list[TrainSequence]]:
        """Deals the share of one worker into micro-batches, longest first; sequences of an item stay together."""
        return [[*chain(*items)] for items in deal(self._items(rank, world_size), count)]

    def _items(self, rank: int, world_size: int) -> list[tuple[TrainSequence, ...]]:
        share = slice(rank, None, world_size)
        return sorted([*self.anchor[share], *self.recovery[share]], key=lambda item: max(map(len, item)), reverse=True)


class Planner:
    """Draws step plans.

    Args:
        samples: Everything that can be drawn.
        anchor_batch_size: Anchor sequences of a step over all workers.
        recovery_batch_size: The same for recovery; ignored where there are no recovery samples.
        seed: Of the order of samples.
        borderline_fraction: Share of the anchor sequences that are of borderline prompts, on average over steps; None
            for the share that these have of the samples. Ignored where all anchor samples are borderline or none is.
    """

    def __init__(
        self,
        samples: SampleSet,
        *,
        anchor_batch_size: int,
        recovery_batch_size: int,
        seed: int,
        borderline_fraction: float | None = None,
    ) -> None:
        self._anchor_batch_size = anchor_batch_size
        self._recovery = samples.recovery
        self._recovery_batch_size = recovery_batch_size if samples.recovery else 0
        self._seed = seed
        self._borderline = tuple(sample for sample in samples.anchor if sample.kind == "borderline")
        self._others = tuple(sample for sample in samples.anchor if sample.kind != "borderline")
        self._borderline_per_step = anchor_batch_size * (borderline_fraction or 0.0)
        if borderline_fraction is None or not (self._borderline and self._others):
            self._borderline, self._others, self._borderline_per_step = (), samples.anchor, 0.0
        self._orders: dict[tuple[str, int], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}

    def samples_of(self, step: int) -> tuple[list[AnchorSample], list[RecoverySample]]:
        """The samples of a step, whatever their depths will be: known ahead, so that they can be scored ahead."""
        first, last = (int(self._borderline_per_step * done + 1e-9) for done in (step, step + 1))
        size = self._anchor_batch_size
        anchor = self._draw("borderline", self._borderline, first, last)
        anchor += self._draw("anchor", self._others, step * size - first, (step + 1) * size - last)
        if self._borderline:  # groups of rollouts take the first ones
            mixture = np.random.default_rng([self._seed, _SEED_TAGS["mixture"], step + 1]).permutation(size)
            anchor = [anchor[place] for place in mixture]
        size = self._recovery_batch_size
        return anchor, self._draw("recovery", self._recovery, step * size, (step + 1) * size)

    def plan(self, step: int, sampler: DepthSampler) -> StepPlan:
        """The plan of a step; `sampler` must have seen every step before it."""
        anchor, recovery = self.samples_of(step)
        depths = sampler.draw(step, len(recovery)) if recovery else []
        return StepPlan(
            tuple(AnchorItem(sample) for sample in anchor),
            tuple(RecoveryItem.cut(sample, depth) for sample, depth in zip(recovery, depths, strict=True)),
        )

    def _draw(self, part: str, samples: Sequence[S], first: int, last: int) -> list[S]:
        """Draws places [first, last) of an endless sequence of shuffled epochs; no epoch leaves a sample out."""
        size = len(samples)
        return [samples[self._order(part, size, place // size)[place % size]] for place in range(first, last)]

    def _order(self, part: str, size: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if (part, epoch) not in self._orders:
            # numpy pads short seeds with zeros, so every use of a seed needs a tag of its own that is not 0.
            generator = np.random.default_rng([self._seed, _SEED_TAGS[part], epoch + 1])
            gone = [key for key in self._orders if key[0] == part and key[1] < epoch - 1]
            for key in gone:
                del self._orders[key]
            self._orders[(part, epoch)] = generator.permutation(size)
        return self._orders[(part, epoch)]
