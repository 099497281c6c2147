"""How far policies have moved from base at each response position: running statistics with intervals over prompts.

Two parts: statistics by position (sums in float64, so that any number of prompts fits), and the completion depth, the
one number a reader remembers. The rows come from `raycomplete.diagnosis.rows`.

The statistics and the completion depth are ours, not those of arXiv 2511.12155.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raycomplete.diagnosis.rows import METRICS

_DEFICIT = METRICS.index("deficit")
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def t_quantile(degrees_of_freedom: Tensor) -> Tensor:
    """The 97.5 % point of Student's t: exact for 1 and 2, else Cornish and Fisher's expansion (within 0.15 %).

    Args:
        degrees_of_freedom: Any shape, at least 1.
    """
    z, n = _Z, degrees_of_freedom.double()
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    value = z + sum(term / n ** (power + 1) for power, term in enumerate(terms))
    value = torch.where(n == 1, math.tan(math.pi * 0.475), value)
    return torch.where(n == 2, 0.95 / math.sqrt(2 * 0.975 * 0.025), value)


class PositionStatistics:
    """Running mean, spread and bootstrap of values by position; one prompt after the other, none is kept.

    The unit of sampling is the prompt: each gives at most one value at a position. The interval of a mean is Student's
    t over the prompts that reach the position, pointwise. The completion depth is no mean, so its interval comes from
    a Poisson bootstrap over prompts: prompt i enters replicate r with weight Poisson(1) drawn under (seed, i), which
    needs running sums only and does not depend on how prompts were split into batches.

    Args:
        num_columns: Values of a row, M.
        bootstrap_column: The column whose sums are kept for each replicate.
        replicates: Bootstrap replicates.
        seed: Of the bootstrap.
    """

    def __init__(
        self,
        num_columns: int = len(METRICS),
        *,
        bootstrap_column: int = _DEFICIT,
        replicates: int = 400,
        seed: int = 0,
    ) -> None:
        self._column, self._seed = bootstrap_column, seed
        self._count_T = torch.zeros(0, dtype=torch.float64)
        self._sum_TM = torch.zeros(0, num_columns, dtype=torch.float64)
        self._square_TM = torch.zeros(0, num_columns, dtype=torch.float64)
        # Rows: the two halves of the prompts (even and odd), then the replicates.
        self._weight_RT = torch.zeros(2 + replicates, 0, dtype=torch.float64)
        self._weighted_RT = torch.zeros(2 + replicates, 0, dtype=torch.float64)
        self.num_prompts = 0

    def add(self, values_TM: Tensor) -> None:
        """Adds one prompt: its values at positions 0 to T - 1."""
        values_TM = values_TM.detach().double().cpu()
        length = values_TM.shape[0]
        self._grow(length)
        self._count_T[:length] += 1
        self._sum_TM[:length] += values_TM
        self._square_TM[:length] += values_TM.square()
        # NumPy's, which takes both numbers whole; torch's reads the lower 32 bits of a seed only.
        drawn_R = np.random.default_rng([self._seed, self.num_prompts]).poisson(1.0, self._weight_RT.shape[0] - 2)
        even = float(self.num_prompts % 2 == 0)
        weight_R = torch.cat(
            [
                torch.tensor([even, 1 - even], dtype=torch.float64),
                torch.from_numpy(drawn_R).double(),
            ]
        )
        self._weight_RT[:, :length] += weight_R[:, None]
        self._weighted_RT[:, :length] += weight_R[:, None] * values_TM[:, self._column]
        self.num_prompts += 1

    def _grow(self, length: int) -> None:
        missing = length - self._count_T.shape[0]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._count_T = pad(self._count_T, (0, missing))
            self._sum_TM, self._square_TM = (pad(sums, (0, 0, 0, missing)) for sums in (self._sum_TM, self._square_TM))
            self._weight_RT, self._weighted_RT = (
                pad(sums, (0, missing)) for sums in (self._weight_RT, self._weighted_RT)
            )

    @property
    def count_T(self) -> Tensor:
        """Prompts that reach each position [T]."""
        return self._count_T.clone()

    def mean_TM(self) -> Tensor:
        """Means over the prompts that reach each position [T, M]."""
        return self._sum_TM / self._count_T[:, None]

    def half_width_TM(self) -> Tensor:
        """Half of the 95 % interval of each mean [T, M]; infinite where a single prompt reaches the position."""
        count_T1 = self._count_T[:, None]
        spread_TM = (self._square_TM - self._sum_TM.square() / count_T1).clamp(min=0.0)
        alone_T1 = count_T1 < 2
        free_T1 = (count_T1 - 1).clamp(min=1)
        half_TM = t_quantile(free_T1) * (spread_TM / free_T1 / count_T1).sqrt()
        return half_TM.masked_fill(alone_T1.expand_as(half_TM), math.inf)

    def completion_depth(self, threshold: float) -> CompletionDepth:
        """See `CompletionDepth`; the halves are the prompts of even and of odd number."""
        whole = _crossing(self._count_T[None], self._sum_TM[None, :, self._column], threshold)
        depths_R = _crossing(self._weight_RT, self._weighted_RT, threshold)
        drawn_R = depths_R[2:].double()
        ends = (
            torch.quantile(drawn_R, torch.tensor([0.025, 0.975], dtype=torch.float64))
            if len(drawn_R)
            else whole[[0, 0]]
        )
        size = self._count_T.shape[0]

        def reached(depth: float) -> int | None:
            return None if depth >= size else int(depth)

        return CompletionDepth(
            depth=reached(whole.item()),
            low=reached(math.floor(ends[0].item())),
            high=reached(math.ceil(ends[1].item())),
            halves=(reached(depths_R[0].item()), reached(depths_R[1].item())),
            threshold=threshold,
            num_positions=size,
        )


@dataclass(frozen=True)
class CompletionDepth:
    """The completion depth: the first position at which the non-decreasing fit of the mean deficit exceeds a threshold.

    Up to there alignment changed the model, from there on it is base. Fitting a non-decreasing curve first keeps one
    noisy position from deciding. The definition is ours. None stands for "not within the measured positions".

    Attributes:
        depth: First position, or None where the fit stays below the threshold.
        low: Lower end of the 95 % percentile bootstrap interval over prompts.
        high: Upper end, or None where it lies beyond the measured positions.
        halves: The same of every second prompt and of the others, a check against the choice of prompts.
        threshold: Deficit that must be exceeded, 0 to 1.
        num_positions: Positions that were measured.
    """

    depth: int | None
    low: int | None
    high: int | None
    halves: tuple[int | None, int | None]
    threshold: float
    num_positions: int


def _crossing(weight_RT: Tensor, weighted_RT: Tensor, threshold: float) -> Tensor:
    """First position [R] at which the isotonic fit of weighted_RT / weight_RT exceeds the threshold, T for none.

    The isotonic fit exceeds a level from the last minimum of the cumulative sum of (value - level) on, so no fit has to
    be computed.
    """
    excess_RT = weighted_RT - threshold * weight_RT
    partial_RT = torch.nn.functional.pad(excess_RT.cumsum(dim=-1), (1, 0))
    return partial_RT.shape[1] - 1 - partial_RT.flip(-1).argmin(dim=-1)


def position_bands(num_positions: int) -> list[tuple[int, int]]:
    """First and last position of each band: 0, 1 to 3, 4 to 7, 8 to 15 and on, doubling."""
    bands, start = [(0, 0)], 1
    while start < num_positions:
        end = 3 if start == 1 else 2 * start - 1
        bands.append((start, min(end, num_positions - 1)))
        start = end + 1
    return bands
