"""Feedback of earlier steps to the next one, under `method.depth.schedule: adaptive`: the depths where recovery is
incomplete. The rule is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raycomplete.methods.registry import DepthConfig
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

    Args:
        config: Depth range, bins, floor and decay.
        seed: Non-negative; draws are a function of (seed, step, running means), so a resumed run repeats them.
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
        """Index of the bin that holds a depth.

        Raises:
            ValueError: The depth is outside [min, max].
        """
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
        """Depths for one step.

        Args:
            step: Step number, non-negative; the same step gives the same depths under the same running means.
            count: How many.

        Returns:
            `count` depths in tokens.
        """
        rng = np.random.default_rng([self._seed, _SEED_TAG, step + 1])
        bins = rng.choice(self.num_bins, size=count, p=self.probabilities())
        return [int(depth) for depth in rng.integers(self._first[bins], self._last[bins] + 1)]

    def update(self, loss_sum_by_bin: npt.ArrayLike, count_by_bin: npt.ArrayLike) -> None:
        """Takes in one step's recovery loss by bin (or, instead of losses, its counts of compliance).

        The first measurement of a bin sets its mean; later ones enter with weight 1 - decay, and bins that were not
        seen keep theirs. A mean below 0, which only rounding can give, counts as 0.

        Args:
            loss_sum_by_bin: Sum over items of their mean loss in nats, or of 1 where the student complied [num_bins],
                over all workers.
            count_by_bin: Number of those items [num_bins].

        Raises:
            ValueError: A shape is not [num_bins], or a count is negative.
            NotFiniteError: A sum is NaN or infinite.
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
        """Takes up the running means of a saved run.

        Raises:
            CheckpointError: The state was saved under other depths or bins.
        """
        if [tuple(item) for item in state["bin_ranges"]] != self.bin_ranges:
            raise CheckpointError(
                f"The checkpoint's depth bins {state['bin_ranges']} differ from the run file's {self.bin_ranges}.",
                "Resume with the method.depth settings of the saved run.",
            )
        values = [np.nan if value is None else float(value) for value in state["running_loss"]]
        self._running_loss = np.array(values, dtype=np.float64)
