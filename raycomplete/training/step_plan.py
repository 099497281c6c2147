"""Which samples each step trains, as a pure function of seed, step and sampler state.

Every rank computes the same global plan and takes its slice, so ranks never exchange indices, a resumed run continues
with the very next samples, and the loss does not depend on the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.training.depth_sampler import DepthSampler

_SEED_TAGS = {"anchor": 11, "recovery": 12}


@dataclass(frozen=True, slots=True)
class AnchorItem:
    """One anchor sequence of a step."""

    sample: AnchorSample


@dataclass(frozen=True, slots=True)
class RecoveryItem:
    """One recovery sequence of a step, h cut at `depth`, a refusal prefix included."""

    sample: RecoverySample
    depth: int

    @classmethod
    def cut(cls, sample: RecoverySample, depth: int) -> RecoveryItem:
        """h cut at `depth` tokens after a refusal prefix, or at its end."""
        return cls(sample, min(sample.refusal_prefix_tokens + depth, len(sample.harmful_ids)))

    @property
    def answer_depth(self) -> int:
        """Tokens of the compliant answer that the student reads."""
        return self.depth - self.sample.refusal_prefix_tokens


Item = AnchorItem | RecoveryItem


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The sequences of one optimizer step on all workers, and the counts that normalise its loss."""

    anchor: tuple[AnchorItem, ...]
    recovery: tuple[RecoveryItem, ...]

    @property
    def num_anchor_tokens(self) -> int:
        """Response tokens of all anchor sequences."""
        return sum(len(item.sample.answer_ids) for item in self.anchor)

    def num_opening_tokens(self, opening: int) -> int:
        """Tokens among the first `opening` ones of their anchor answer."""
        return sum(min(len(item.sample.answer_ids), opening) for item in self.anchor)

    @property
    def num_recovery_tokens(self) -> int:
        """Refusal tokens of all recovery sequences."""
        return sum(len(item.sample.refusal_ids) for item in self.recovery)

    @property
    def num_penalty_tokens(self) -> int:
        """Tokens of h before the cut, over all recovery sequences."""
        return sum(item.depth for item in self.recovery)

    def local(self, rank: int, world_size: int) -> list[Item]:
        """The share of one worker, longest first, so that micro-batches pad little."""
        items: list[Item] = [*self.anchor[rank::world_size], *self.recovery[rank::world_size]]
        return sorted(items, key=length, reverse=True)


class Planner:
    """Draws step plans.

    Args:
        samples: Everything that can be drawn.
        anchor_batch: Anchor sequences of a step over all workers.
        recovery_batch: The same for recovery; ignored where there are no recovery samples.
        seed: Of the order of samples.
        max_depth: Longest cut.
    """

    def __init__(
        self, samples: SampleSet, *, anchor_batch: int, recovery_batch: int, seed: int, max_depth: int
    ) -> None:
        self._samples = samples
        self._anchor_batch = anchor_batch
        self._recovery_batch = recovery_batch if samples.recovery else 0
        self._seed = seed
        self._max_depth = max_depth
        self._orders: dict[tuple[str, int], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}

    def samples_of(self, step: int) -> tuple[list[AnchorSample], list[RecoverySample]]:
        """The samples of a step, whatever their depths will be: known ahead, so that they can be scored ahead."""
        anchor = self._draw("anchor", len(self._samples.anchor), self._anchor_batch, step)
        recovery = self._draw("recovery", len(self._samples.recovery), self._recovery_batch, step)
        return [self._samples.anchor[i] for i in anchor], [self._samples.recovery[i] for i in recovery]

    def plan(self, step: int, sampler: DepthSampler) -> StepPlan:
        """The plan of a step; `sampler` must have seen every step before it."""
        anchor, recovery = self.samples_of(step)
        depths = sampler.draw(step, len(recovery)) if recovery else []
        return StepPlan(
            tuple(AnchorItem(sample) for sample in anchor),
            tuple(
                RecoveryItem.cut(sample, min(depth, self._max_depth))
                for sample, depth in zip(recovery, depths, strict=True)
            ),
        )

    def _draw(self, part: str, size: int, count: int, step: int) -> list[int]:
        """`count` indices of an endless sequence of shuffled epochs; nothing is left out at an epoch's end."""
        positions = range(step * count, (step + 1) * count)
        return [int(self._order(part, size, position // size)[position % size]) for position in positions]

    def _order(self, part: str, size: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if (part, epoch) not in self._orders:
            # numpy pads short seeds with zeros, so every use of a seed needs a tag of its own that is not 0.
            generator = np.random.default_rng([self._seed, _SEED_TAGS[part], epoch + 1])
            self._orders = {key: order for key, order in self._orders.items() if key[1] >= epoch - 1}
            self._orders[(part, epoch)] = generator.permutation(size)
        return self._orders[(part, epoch)]


def length(item: Item) -> int:
    """Tokens that the student reads for an item."""
    if isinstance(item, AnchorItem):
        return len(item.sample.prompt_ids) + len(item.sample.answer_ids) - 1
    return len(item.sample.prompt_ids) + item.depth + len(item.sample.refusal_ids) - 1
