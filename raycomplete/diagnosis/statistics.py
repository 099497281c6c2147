"""Measures how far policies moved from base at each position: running statistics, completion depths, diagnosis.json.

Sums are in float64, so that any number of prompts fits. A summary is made from the partitions on disk in their order,
one at a time, so an interrupted and resumed diagnosis gives the same numbers as one that ran through. The statistics
and the completion depth are ours, not those of arXiv 2511.12155.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from raycomplete.data.stream import partition_metadata, read_partition
from raycomplete.diagnosis.partitions import merged_tokens, position_bands, samples_of
from raycomplete.diagnosis.rows import METRICS
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import read_json

_DEFICIT = METRICS.index("deficit")
_INTERVALS = (
    "means: Student's t over prompts, pointwise; completion depth: percentiles of a Poisson bootstrap over prompts"
)
_UNBOUNDED = ("base_favored_count", "kl_to_base")  # the other metrics end at 1


class PositionStatistics:
    """Running mean, spread and bootstrap of values by position, one prompt after the other.

    The unit of sampling is the prompt: each gives at most one value at a position. The interval of a mean is Student's
    t over the prompts that reach the position, pointwise. The completion depth is no mean, so its interval comes from
    a Poisson bootstrap over prompts: prompt i enters replicate r with weight Poisson(1) drawn under (seed, i), which
    needs running sums only and does not depend on how prompts were split into batches.

    Args:
        num_columns: Values of a row, M.
        bootstrap_column: The column of the completion depth.
        replicates: Bootstrap replicates.
        seed: Of the bootstrap.
    """

    def __init__(
        self, num_columns: int = len(METRICS), bootstrap_column: int = _DEFICIT, *, replicates: int, seed: int = 0
    ) -> None:
        self._column, self._replicates, self._seed = bootstrap_column, replicates, seed
        # Columns: count, sums, squares, then weights and weighted sums of the even prompts, of the odd ones and of each
        # replicate.
        self._sizes = [1, num_columns, num_columns, 2 + replicates, 2 + replicates]
        self._sums_TK = torch.zeros(0, sum(self._sizes), dtype=torch.float64)
        self.num_prompts = 0

    def add(self, values_TM: Tensor) -> None:
        """Adds one prompt: its values at positions 0 to T - 1."""
        values_TM = values_TM.detach().double().cpu()
        length = values_TM.shape[0]
        # NumPy's, which takes both numbers whole; torch's reads the lower 32 bits of a seed only.
        drawn_R = np.random.default_rng([self._seed, self.num_prompts]).poisson(1.0, self._replicates)
        even = float(self.num_prompts % 2 == 0)
        weight_TR = torch.tensor([[even, 1 - even, *drawn_R.tolist()]], dtype=torch.float64).expand(length, -1)
        weighted_TR = weight_TR * values_TM[:, self._column, None]
        count_T1 = torch.ones(length, 1, dtype=torch.float64)
        if (missing := length - len(self._sums_TK)) > 0:
            self._sums_TK = torch.nn.functional.pad(self._sums_TK, (0, 0, 0, missing))
        self._sums_TK[:length] += torch.cat([count_T1, values_TM, values_TM.square(), weight_TR, weighted_TR], dim=1)
        self.num_prompts += 1

    def _sums(self) -> list[Tensor]:
        return list(self._sums_TK.split(self._sizes, dim=1))

    @property
    def count_T(self) -> Tensor:
        """Prompts that reach each position [T]."""
        return self._sums_TK[:, 0]

    def mean_TM(self) -> Tensor:
        """Means over the prompts that reach each position [T, M]."""
        count_T1, sum_TM, *_ = self._sums()
        return sum_TM / count_T1

    def half_width_TM(self) -> Tensor:
        """Half of the 95 % interval of each mean [T, M]; infinite where a single prompt reaches the position."""
        count_T1, sum_TM, square_TM, *_ = self._sums()
        spread_TM = (square_TM - sum_TM.square() / count_T1).clamp(min=0.0)
        free_T1 = (count_T1 - 1).clamp(min=1)
        quantile_T1 = torch.from_numpy(stdtrit(free_T1.numpy(), 0.975))  # of Student's t
        half_TM = quantile_T1 * (spread_TM / free_T1 / count_T1).sqrt()
        return half_TM.masked_fill(count_T1 < 2, math.inf)

    def completion_depth(self, threshold: float) -> CompletionDepth:
        """The completion depth; its halves are the prompts of even and of odd number."""
        count_T1, sum_TM, _, weight_TR, weighted_TR = self._sums()
        whole = _crossing(count_T1.T, sum_TM[None, :, self._column], threshold)
        depths_R = _crossing(weight_TR.T, weighted_TR.T, threshold)
        drawn_R, percentiles = depths_R[2:].double(), torch.tensor([0.025, 0.975], dtype=torch.float64)
        ends = torch.quantile(drawn_R, percentiles) if len(drawn_R) else whole[[0, 0]]
        size = len(self._sums_TK)

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
        low: Lower end of the 95 % percentile bootstrap interval over prompts.
        high: Its upper end.
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

    It does so from the last minimum of the cumulative sum of (value - level) on, so no fit has to be computed.
    """
    excess_RT = weighted_RT - threshold * weight_RT
    partial_RT = torch.nn.functional.pad(excess_RT.cumsum(dim=-1), (1, 0))
    return partial_RT.shape[1] - 1 - partial_RT.flip(-1).argmin(dim=-1)


def summarize(run: Run, names: Mapping[str, Sequence[str]], policies: Sequence[str]) -> dict[str, Any]:
    """Makes diagnosis.json as far as the partitions decide it; gradient, baseline and seconds come later.

    Args:
        run: The run, whose folder holds partitions/ and tokens/.
        names: Partitions in order by kind of prompts.
        policies: Roles by their number in the files.

    Raises:
        WorkError: No harmful prompt has a compliant continuation.
    """
    kinds = {kind: kind_summary(run, found, policies) for kind, found in names.items()}
    if not kinds["harmful"]["measured"]:
        raise WorkError(
            f"None of {kinds['harmful']['prompts']} harmful prompts has a compliant continuation.",
            "Name an answer column, or set rollout.affirmative_prefixes; then run again with --overwrite.",
        )
    stats = [_stats(run, name) for found in names.values() for name in found]
    measured_s, read = (sum(found[key] for found in stats) for key in ("measured_s", "read_tokens"))
    return {
        "name": run.config.output.name,
        "policies": list(policies),
        "models": {str(role): run.models.fingerprint(role) for role in run.models.paths},
        "settings": run.config.diagnose.model_dump(mode="json"),
        "intervals": _INTERVALS,
        "refusal_tokens": (read_json(run.folder / "refusal_tokens.json") or {}).get("tokens", []),
        "kinds": kinds,
        "tokens": token_table(run, names, policies),
        "gradient": None,
        "measured_s": measured_s,
        "tokens_per_s": read / measured_s if measured_s else None,
        "seconds": None,
        "versions": read_json(run.folder / "environment.json"),
    }


def kind_summary(run: Run, names: Sequence[str], policies: Sequence[str]) -> dict[str, Any]:
    """Profile and completion depth of each policy on one kind of prompts."""
    settings = run.config.diagnose
    statistics = {role: PositionStatistics(replicates=settings.replicates) for role in policies}
    counts = {"prompts": 0, "measured": 0, "tokens": 0}
    for name in names:
        stats, rows = _stats(run, name), read_partition(run.folder / "partitions" / f"{name}.parquet")
        counts["prompts"] += stats["prompts"]
        counts["measured"] += stats["measured"]
        if not rows:
            continue
        values_NM = np.stack([rows[metric] for metric in METRICS], axis=1).astype(np.float64)
        for _, role, where in samples_of(rows):
            statistics[policies[role]].add(torch.from_numpy(values_NM[where]))
            counts["tokens"] += (where.stop - where.start) if role == 0 else 0
    measured = {role: found for role, found in statistics.items() if found.num_prompts}
    depths = {role: asdict(found.completion_depth(settings.threshold)) for role, found in measured.items()}
    return {
        **counts,
        "profile": {role: _profile(found) for role, found in measured.items()},
        "completion_depth": depths,
    }


def _stats(run: Run, name: str) -> dict[str, Any]:
    found = partition_metadata(run.folder / "partitions" / f"{name}.parquet")
    assert found is not None
    return found


def _profile(statistics: PositionStatistics) -> dict[str, Any]:
    tops = [math.inf if metric in _UNBOUNDED else 1.0 for metric in METRICS]
    curves = zip(METRICS, intervals(statistics, tops), strict=True)
    return {"n": [int(count) for count in statistics.count_T.tolist()], **dict(curves)}


def intervals(statistics: PositionStatistics, tops: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Mean, low and high of each column by position, cut at 0 and its top; None where one prompt leaves them open."""
    found = []
    columns = zip(statistics.mean_TM().T.tolist(), statistics.half_width_TM().T.tolist(), strict=True)
    for column, (mean_T, half_T) in enumerate(columns):
        top = tops[column] if tops else math.inf
        low = [max(0.0, m - h) if math.isfinite(h) else None for m, h in zip(mean_T, half_T, strict=True)]
        high = [min(top, m + h) if math.isfinite(h) else None for m, h in zip(mean_T, half_T, strict=True)]
        found.append({"mean": mean_T, "low": low, "high": high})
    return found


def token_table(run: Run, names: Mapping[str, Sequence[str]], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Base-favored tokens with the largest mass by kind, policy and band of positions.

    `share` is the token's part of the band's whole base-favored mass. `context` is the text before its strongest
    occurrence; on harmful prompts it is masked unless `diagnose.show_harmful` is on.
    """
    settings, codec = run.config.diagnose, run.models.codec
    bands, table = position_bands(settings.max_tokens), []
    for kind, parts in names.items():
        masked = kind == "harmful" and not settings.show_harmful
        columns = merged_tokens([read_partition(run.folder / "tokens" / f"{name}.parquet") for name in parts])
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        items = [dict(zip(columns, values, strict=True)) for values in rows]
        for (role, band), found in groupby(items, key=lambda item: (item["role"], item["band"])):
            ranked = sorted(found, key=lambda item: (-item["mass"], item["token_id"]))
            whole = sum(item["mass"] for item in ranked)
            for item in ranked[: settings.table_tokens]:
                context = codec.decode([int(token) for token in item["context"]])
                table.append(
                    {
                        "kind": kind,
                        "role": policies[role],
                        "band": list(bands[band]),
                        "token": codec.decode([item["token_id"]]),
                        "token_id": item["token_id"],
                        "share": item["mass"] / whole,
                        "count": int(item["count"]),
                        "base_probability": item["mass"] / item["count"],
                        "policy_probability": item["policy_mass"] / item["count"],
                        "position": item["position"],
                        "context": mask(context) if masked else context,
                    }
                )
    return table


def mask(text: str) -> str:
    """Hides a text's content and keeps its shape: every letter and digit becomes a dot."""
    return re.sub(r"\w", "\N{BULLET}", text)
