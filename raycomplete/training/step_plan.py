"""The samples that each step trains, as a pure function of seed, step and sampler state.

Every rank computes the same global plan and takes its slice, so ranks never exchange indices, a resumed run continues
with the next samples, and the loss does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import AnchorItem, DepthConfig, Method, RecoveryItem, TrainSequence
from raycomplete.runtime.errors import CheckpointError, NotFiniteError

_SEED_TAG = 13  # numpy pads short seeds with zeros: every use of a seed needs a tag that is not 0
FloatArray = npt.NDArray[np.float64]


class DepthSampler:
    """Draws prefill depths in [min, max] tokens: evenly, or if adaptive most where recovery loss is still high.

    Bins have equal width rather than growing geometrically: every bin then gets about the same number of measurements,
    and the deep end, where students keep failing longest, does not disappear into one wide bin.

    P(bin) = floor * share + (1 - floor) * loss * share / sum(loss * share), with share the bin's part of all depths and
    loss the running mean of what is still incomplete there (recovery loss, or how often the student complies); uniform
    within a bin. Bins without a measurement count as average, and before any measurement, or with schedule "uniform",
    P(bin) = share.
    """

    def __init__(self, config: DepthConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        depths = np.arange(config.min, config.max + 1)
        bins = np.array_split(depths, min(config.bins, len(depths)))
        self._first = np.array([part[0] for part in bins])
        self._last = np.array([part[-1] for part in bins])
        self._share: FloatArray = np.array([len(part) for part in bins], dtype=np.float64) / len(depths)
        self._running_loss: FloatArray = np.full(len(bins), np.nan)  # NaN: never measured

    @property
    def num_bins(self) -> int:
        """Number of bins: `config.bins`, or the number of depths where that is smaller."""
        return len(self._share)

    @property
    def bin_ranges(self) -> list[tuple[int, int]]:
        """First and last depth of each bin, both included."""
        return [(int(first), int(last)) for first, last in zip(self._first, self._last, strict=True)]

    def bin_of(self, depth: int) -> int:
        """Index of the bin that holds a depth."""
        if not self._config.min <= depth <= self._config.max:
            raise ValueError(f"Depth {depth} is outside {self._config.min}..{self._config.max}.")
        return int(np.searchsorted(self._last, depth))

    def probabilities(self) -> FloatArray:
        """Probability of each bin [num_bins]; sums to 1."""
        measured = ~np.isnan(self._running_loss)
        if self._config.schedule == "uniform" or not measured.any():
            return self._share.copy()
        average = np.average(self._running_loss[measured], weights=self._share[measured])
        need = np.where(measured, self._running_loss, average) * self._share
        if need.sum() <= 0:  # nothing left to learn anywhere
            return self._share.copy()
        mixed = self._config.uniform_floor * self._share + (1 - self._config.uniform_floor) * need / need.sum()
        probabilities: FloatArray = mixed / mixed.sum()
        return probabilities

    def draw(self, step: int, count: int) -> list[int]:
        """Draws `count` depths in tokens; the same step gives the same depths under the same running means."""
        rng = np.random.default_rng([self._seed, _SEED_TAG, step + 1])
        bins = rng.choice(self.num_bins, size=count, p=self.probabilities())
        return [int(depth) for depth in rng.integers(self._first[bins], self._last[bins] + 1)]

    def update(self, loss_sum_by_bin: npt.ArrayLike, count_by_bin: npt.ArrayLike) -> None:
        """Takes in one step's recovery loss by bin [num_bins] over all workers, or its counts of compliance.

        A bin's loss is the sum over its items of their mean loss in nats. The first measurement of a bin sets its mean;
        later ones enter with weight 1 - decay, and bins that were not seen keep theirs. A mean below 0, which only
        rounding can give, counts as 0.
        """
        loss_sum = np.asarray(loss_sum_by_bin, dtype=np.float64)
        count = np.asarray(count_by_bin, dtype=np.float64)
        if loss_sum.shape != (self.num_bins,) or count.shape != (self.num_bins,):
            raise ValueError(f"Loss and count must be [{self.num_bins}], got {loss_sum.shape} and {count.shape}.")
        if (count < 0).any():
            raise ValueError(f"Counts must not be negative, got {count.tolist()}.")
        seen = count > 0
        if not np.isfinite(loss_sum[seen]).all():
            raise NotFiniteError(f"The recovery loss by depth is not finite: {loss_sum.tolist()}.", "Lower train.lr.")
        mean = np.maximum(loss_sum[seen] / count[seen], 0.0)
        old = self._running_loss[seen]
        decay = self._config.decay
        self._running_loss[seen] = np.where(np.isnan(old), mean, decay * old + (1 - decay) * mean)

    def state_dict(self) -> dict[str, Any]:
        """The running means and the bins that they belong to, as plain JSON types (None: never measured)."""
        return {
            "bin_ranges": [list(item) for item in self.bin_ranges],
            "running_loss": [None if np.isnan(value) else float(value) for value in self._running_loss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the running means of a saved run with the same bins."""
        if [tuple(item) for item in state["bin_ranges"]] != self.bin_ranges:
            raise CheckpointError(
                f"The checkpoint's depth bins {state['bin_ranges']} differ from the run file's {self.bin_ranges}.",
                "Resume with the method.depth settings of the saved run.",
            )
        values = [np.nan if value is None else float(value) for value in state["running_loss"]]
        self._running_loss = np.array(values, dtype=np.float64)


S = TypeVar("S", AnchorSample, RecoverySample)
T = TypeVar("T")
_SEED_TAGS = {"anchor": 11, "recovery": 12, "borderline": 17, "mixture": 18}  # 13 to 16: feedback, on_policy


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The samples of one optimizer step on all workers, and where they are cut."""

    anchor: tuple[AnchorItem, ...]
    recovery: tuple[RecoveryItem, ...]


@dataclass(frozen=True)
class StepSequences:
    """The sequences of one optimizer step on all workers, item by item, and the divisor of each term's row weights."""

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
        share = slice(rank, None, world_size)
        items = sorted([*self.anchor[share], *self.recovery[share]], key=lambda item: max(map(len, item)), reverse=True)
        return [[*chain(*part)] for part in deal(items, count)]


def deal(items: Sequence[T], count: int) -> list[list[T]]:
    """Deals items, which come longest first, to `count` micro-batches back and forth: each has about as many tokens.

    Every worker must make the same number of forward passes, or collectives hang; so the number is fixed and the
    lengths are balanced, rather than the other way round.
    """
    groups: list[list[T]] = [[] for _ in range(count)]
    for index, item in enumerate(items):
        lap, place = divmod(index, count)
        groups[place if lap % 2 == 0 else count - 1 - place].append(item)
    return [group for group in groups if group]


class Planner:
    """Draws step plans."""

    def __init__(
        self,
        samples: SampleSet,
        *,
        anchor_batch_size: int,
        recovery_batch_size: int,
        seed: int,
        borderline_fraction: float | None = None,  # of the anchor sequences; None: their share of the samples
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
        items = tuple(RecoveryItem.cut(sample, depth) for sample, depth in zip(recovery, depths, strict=True))
        return StepPlan(tuple(AnchorItem(sample) for sample in anchor), items)

    def _draw(self, part: str, samples: Sequence[S], first: int, last: int) -> list[S]:
        """Draws places [first, last) of an endless sequence of shuffled epochs; no epoch leaves a sample out."""
        size = len(samples)
        return [samples[self._order(part, size, place // size)[place % size]] for place in range(first, last)]

    def _order(self, part: str, size: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if (part, epoch) not in self._orders:
            # numpy pads short seeds with zeros, so every use of a seed needs a tag of its own that is not 0.
            generator = np.random.default_rng([self._seed, _SEED_TAGS[part], epoch + 1])
            for key in [key for key in self._orders if key[0] == part and key[1] < epoch - 1]:
                del self._orders[key]
            self._orders[(part, epoch)] = generator.permutation(size)
        return self._orders[(part, epoch)]
