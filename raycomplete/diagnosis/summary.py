"""From finished partitions to diagnosis.json: profiles with intervals, completion depths, the table of tokens.

Everything is summed from the partitions on disk in their order, one at a time, so an interrupted and resumed diagnosis
gives the same numbers as one that ran through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomplete.config import DiagnoseConfig
from raycomplete.data.stream import Columns, partition_metadata, read_partition
from raycomplete.diagnosis.partitions import samples_of
from raycomplete.diagnosis.rows import METRICS
from raycomplete.diagnosis.statistics import PositionStatistics, position_bands
from raycomplete.runtime.types import Codec

_UNBOUNDED = ("base_favored_count", "kl_to_base")  # the other metrics end at 1


def kind_summary(
    folder: Path, names: Sequence[str], policies: Sequence[str], settings: DiagnoseConfig
) -> dict[str, Any]:
    """Profile and completion depth of each policy on one kind of prompts.

    Args:
        folder: Holds partitions/.
        names: Partitions in order.
        policies: Roles by their number in the files.
        settings: Threshold and bootstrap.
    """
    statistics = {role: PositionStatistics(replicates=settings.replicates) for role in policies}
    counts = {"prompts": 0, "measured": 0, "tokens": 0}
    for name in names:
        file = folder / "partitions" / f"{name}.parquet"
        stats = partition_metadata(file) or {}
        counts["prompts"] += stats.get("prompts", 0)
        counts["measured"] += stats.get("measured", 0)
        rows = read_partition(file)
        if not rows:
            continue
        values_NM = np.stack([rows[metric] for metric in METRICS], axis=1).astype(np.float64)
        for _, role, where in samples_of(rows):
            statistics[policies[role]].add(torch.from_numpy(values_NM[where]))
            counts["tokens"] += (where.stop - where.start) if role == 0 else 0
    measured = {role: found for role, found in statistics.items() if found.num_prompts}
    return {
        **counts,
        "profile": {role: profile(found) for role, found in measured.items()},
        "completion_depth": {
            role: asdict(found.completion_depth(settings.threshold)) for role, found in measured.items()
        },
    }


def profile(statistics: PositionStatistics) -> dict[str, Any]:
    """Means and 95 % intervals by position as plain lists; None where a single prompt leaves the interval open."""
    mean_MT, half_MT = statistics.mean_TM().T, statistics.half_width_TM().T
    found: dict[str, Any] = {"n": [int(count) for count in statistics.count_T.tolist()]}
    for metric, mean_T, half_T in zip(METRICS, mean_MT.tolist(), half_MT.tolist(), strict=True):
        top = math.inf if metric in _UNBOUNDED else 1.0
        found[metric] = {
            "mean": mean_T,
            "low": [max(0.0, m - h) if math.isfinite(h) else None for m, h in zip(mean_T, half_T, strict=True)],
            "high": [min(top, m + h) if math.isfinite(h) else None for m, h in zip(mean_T, half_T, strict=True)],
        }
    return found


def token_table(
    folder: Path,
    names: Mapping[str, Sequence[str]],
    policies: Sequence[str],
    codec: Codec,
    settings: DiagnoseConfig,
) -> list[dict[str, Any]]:
    """Base-favored tokens with the largest mass by kind, policy and band of positions.

    `share` is the token's part of the band's whole base-favored mass. `context` is the text before its strongest
    occurrence; on harmful prompts it is masked unless `diagnose.show_harmful` is on.
    """
    table = []
    for kind, parts in names.items():
        masked = kind == "harmful" and not settings.show_harmful
        merged = _merged(read_partition(folder / "tokens" / f"{name}.parquet") for name in parts)
        if not merged:
            continue
        bands = position_bands(settings.max_tokens)
        for number, role in enumerate(policies):
            for band, ends in enumerate(bands):
                found = sorted(
                    (item for item in merged.values() if (item["role"], item["band"]) == (number, band)),
                    key=lambda item: (-item["mass"], item["token_id"]),
                )
                whole = sum(item["mass"] for item in found)
                for item in found[: settings.table_tokens]:
                    context = codec.decode([int(token) for token in item["context"]])
                    table.append(
                        {
                            "kind": kind,
                            "role": role,
                            "band": list(ends),
                            "token": codec.decode([item["token_id"]]),
                            "token_id": item["token_id"],
                            "share": item["mass"] / whole,
                            "count": item["count"],
                            "base_probability": item["mass"] / item["count"],
                            "policy_probability": item["policy_mass"] / item["count"],
                            "position": item["position"],
                            "context": mask(context) if masked else context,
                        }
                    )
    return table


def mask(text: str) -> str:
    """The shape of a text without its content: every letter and digit becomes a dot."""
    return re.sub(r"\w", "\N{BULLET}", text)


def _merged(parts: Iterable[Columns]) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Sums over partitions; of several strongest occurrences the first in order stays."""
    merged: dict[tuple[int, int, int], dict[str, Any]] = {}
    for columns in parts:
        names = list(columns)
        for values in zip(*(columns[name].tolist() for name in names), strict=True):
            item = dict(zip(names, values, strict=True))
            known = merged.setdefault((item["role"], item["band"], item["token_id"]), item)
            if known is item:
                continue
            sums = {name: known[name] + item[name] for name in ("mass", "policy_mass", "count")}
            stronger = item if item["base_probability"] > known["base_probability"] else known
            merged[(item["role"], item["band"], item["token_id"])] = {**stronger, **sums}
    return merged
