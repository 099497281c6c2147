"""Statistics of a diagnosis: means by position with intervals, completion depths, the table of tokens, diagnosis.json.

The unit of sampling is the prompt: each gives at most one value at a position. The statistics and the completion depth
are ours, not those of arXiv 2511.12155.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from raycomplete.diagnosis.measurement import MEASURED_WITH, Batch
from raycomplete.diagnosis.rows import METRICS
from raycomplete.engines.run import Run
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import read_json

THRESHOLD = 0.5  # deficit that ends the completion depth
REPLICATES = 400  # of the bootstrap
TABLE_TOKENS = 8  # shown for each band of positions
CONTEXT_TOKENS = 12  # response tokens shown before a base-favored token
_INTERVALS = (
    "means: Student's t over prompts, pointwise; completion depth: percentiles of a Poisson bootstrap over prompts"
)
_UNBOUNDED = ("base_favored_count", "kl_to_base")  # the other metrics end at 1

Array = np.ndarray[Any, np.dtype[Any]]


def padded(prompts: Sequence[Array]) -> Array:
    """Values of all prompts [P, T, M], NaN behind the end of a response."""
    longest = max(map(len, prompts))
    found = np.full((len(prompts), longest, prompts[0].shape[1]), np.nan)
    for values_TM, row_TM in zip(prompts, found, strict=True):
        row_TM[: len(values_TM)] = values_TM
    return found


def intervals(values_PTM: Array, tops: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Mean, low and high of each column by position, cut at 0 and its top; None where one prompt leaves them open.

    The interval of a mean is Student's t over the prompts that reach the position, pointwise.
    """
    count_T1 = (~np.isnan(values_PTM[:, :, 0])).sum(0)[:, None].astype(float)
    mean_TM = np.nansum(values_PTM, axis=0) / count_T1
    spread_TM = np.nansum((values_PTM - mean_TM) ** 2, axis=0)
    free_T1 = np.maximum(count_T1 - 1, 1)
    half_TM = stdtrit(free_T1, 0.975) * np.sqrt(spread_TM / free_T1 / count_T1)
    has_one_T = count_T1[:, 0] < 2
    found = []
    for column, (mean_T, half_T) in enumerate(zip(mean_TM.T, half_TM.T, strict=True)):
        ends = np.maximum(mean_T - half_T, 0.0), np.minimum(mean_T + half_T, tops[column] if tops else math.inf)
        low, high = ([None if one else float(x) for x, one in zip(end, has_one_T, strict=True)] for end in ends)
        found.append({"mean": mean_T.tolist(), "low": low, "high": high})
    return found


def counts(values_PTM: Array) -> list[int]:
    """Prompts that reach each position [T]."""
    return [int(count) for count in (~np.isnan(values_PTM[:, :, 0])).sum(0)]


@dataclass(frozen=True)
class CompletionDepth:
    """The completion depth: the first position at which the non-decreasing fit of the mean deficit exceeds a threshold.

    Up to there alignment changed the model, from there on it is base. Fitting a non-decreasing curve first keeps one
    noisy position from deciding. The definition is ours. None means "not within the measured positions"."""

    depth: int | None
    low: int | None
    high: int | None
    halves: tuple[int | None, int | None]
    threshold: float
    num_positions: int


def completion_depth(deficit_PT: Array, threshold: float = THRESHOLD, replicates: int = REPLICATES) -> CompletionDepth:
    """The completion depth of deficits with NaN behind the end of a response.

    It is no mean, so its interval comes from a Poisson bootstrap: prompt i enters replicate r with weight Poisson(1)
    drawn under (0, i).
    """
    num_prompts, size = deficit_PT.shape
    even_P = (np.arange(num_prompts) % 2 == 0).astype(float)
    drawn = [np.random.default_rng([0, place]).poisson(1.0, replicates) for place in range(num_prompts)]
    weight_RP = np.concatenate([[np.ones(num_prompts), even_P, 1 - even_P], np.asarray(drawn, dtype=float).T])
    reached_PT = ~np.isnan(deficit_PT)
    depth_R = _crossing(weight_RP @ reached_PT, weight_RP @ np.where(reached_PT, deficit_PT, 0.0), threshold)
    low, high = np.quantile(depth_R[3:], [0.025, 0.975]) if replicates else depth_R[[0, 0]]
    ends = depth_R[0], math.floor(low), math.ceil(high), depth_R[1], depth_R[2]
    depth, least, most, even, odd = (None if end >= size else int(end) for end in ends)
    return CompletionDepth(depth, least, most, (even, odd), threshold, size)


def _crossing(weight_RT: Array, weighted_RT: Array, threshold: float) -> Array:
    """First position [R] at which the isotonic fit of weighted_RT / weight_RT exceeds the threshold, T for none.

    It does so from the last minimum of the cumulative sum of (value - level) on, so no fit has to be computed.
    """
    partial_RT = np.pad((weighted_RT - threshold * weight_RT).cumsum(axis=-1), ((0, 0), (1, 0)))
    return np.asarray(partial_RT.shape[1] - 1 - partial_RT[:, ::-1].argmin(axis=-1))


def summarize(run: Run, measured: Mapping[str, Sequence[Batch]], policies: Sequence[str]) -> dict[str, Any]:
    """Makes diagnosis.json from the batches of each kind of prompts; gradient and seconds come later."""
    kinds = {kind: kind_summary(batches, policies) for kind, batches in measured.items()}
    if not kinds["harmful"]["measured"]:
        raise WorkError(
            f"None of {kinds['harmful']['prompts']} harmful prompts has a compliant continuation.",
            "Name an answer column, or set rollout.affirmative_prefixes; then run again with --overwrite.",
        )
    about = [batch.about for batches in measured.values() for batch in batches]
    measured_s, read = (sum(found[key] for found in about) for key in ("measured_s", "read_tokens"))
    return {
        "name": run.config.output.name,
        "policies": list(policies),
        "models": {str(role): run.models.fingerprint(role) for role in run.models.paths},
        "settings": run.config.diagnose.model_dump(mode="json") | MEASURED_WITH | {"threshold": THRESHOLD},
        "intervals": _INTERVALS,
        "refusal_tokens": (read_json(run.folder / "refusal_tokens.json") or {}).get("tokens", []),
        "kinds": kinds,
        "tokens": token_table(run, measured, policies),
        "gradient": None,
        "measured_s": measured_s,
        "tokens_per_s": read / measured_s if measured_s else None,
        "seconds": None,
        "versions": read_json(run.folder / "environment.json"),
    }


def kind_summary(batches: Sequence[Batch], policies: Sequence[str]) -> dict[str, Any]:
    """Profile and completion depth of each policy on one kind of prompts."""
    tops = [math.inf if metric in _UNBOUNDED else 1.0 for metric in METRICS]
    profiles, depths = {}, {}
    for number, role in enumerate(policies):
        prompts = [values_TM for batch in batches for values_TM in batch.values_of(number)]
        if prompts:
            values_PTM = padded(prompts)
            profiles[role] = {"n": counts(values_PTM)} | dict(zip(METRICS, intervals(values_PTM, tops), strict=True))
            depths[role] = asdict(completion_depth(values_PTM[:, :, METRICS.index("deficit")]))
    return {
        "prompts": sum(batch.about["prompts"] for batch in batches),
        "measured": sum(len(batch.about["measured_ids"]) for batch in batches),
        "tokens": sum(len(batch.arrays["token_N"]) for batch in batches),
        "profile": profiles,
        "completion_depth": depths,
    }


def position_bands(num_positions: int) -> list[tuple[int, int]]:
    """First and last position of each band: 0, 1 to 3, 4 to 7, 8 to 15 and on, doubling."""
    bands, start = [(0, 0)], 1
    while start < num_positions:
        end = 3 if start == 1 else 2 * start - 1
        bands.append((start, min(end, num_positions - 1)))
        start = end + 1
    return bands


def token_table(run: Run, measured: Mapping[str, Sequence[Batch]], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Base-favored tokens with the largest mass by kind, policy and band of positions.

    `share` is the token's part of the band's whole base-favored mass. `context` is the text before its strongest
    occurrence; on harmful prompts it is masked unless `diagnose.show_harmful` is on.
    """
    codec, table = run.models.codec, []
    bands = position_bands(run.config.diagnose.max_tokens)
    for kind, batches in measured.items():
        masked = kind == "harmful" and not run.config.diagnose.show_harmful
        for (role, band), items in _tokens_of(batches).items():
            whole = sum(item["mass"] for item in items)
            for item in sorted(items, key=lambda item: (-item["mass"], item["token_id"]))[:TABLE_TOKENS]:
                context = codec.decode(item["context"])
                table.append(
                    {
                        "kind": kind,
                        "role": policies[role],
                        "band": list(bands[band]),
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


def _tokens_of(batches: Sequence[Batch]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Base-favored tokens by (policy, band): summed probabilities, and the place of the strongest occurrence."""
    if not any(len(batch.arrays["row_K"]) for batch in batches):
        return {}
    firsts = np.cumsum([0, *(len(batch.arrays["token_N"]) for batch in batches)])
    row_K = np.concatenate([batch.arrays["row_K"] + first for batch, first in zip(batches, firsts, strict=False)])
    joined = {
        name: np.concatenate([batch.arrays[name] for batch in batches])
        for name in ("token_N", "length_P", "role_K", "token_K", "base_K", "policy_K")
    }
    position_N = np.concatenate([np.arange(length) for length in joined["length_P"]])
    starts = np.asarray([start for start, _ in position_bands(2**20)])
    band_K = np.searchsorted(starts, position_N[row_K], side="right") - 1
    # One integer a group: np.unique over rows of three would sort far more slowly.
    key_K = (joined["role_K"].astype(np.int64) << 48) | (band_K << 32) | joined["token_K"]
    key_G, group_K = np.unique(key_K, return_inverse=True)
    mass_G, policy_G, count_G = (np.bincount(group_K, weights=joined[name]) if name else np.bincount(group_K)
                                 for name in ("base_K", "policy_K", ""))  # fmt: skip
    # Sorted by group and by falling strength, the first row of each group is its strongest occurrence.
    order_K = np.lexsort((-joined["base_K"], group_K))
    example_G = row_K[order_K[np.searchsorted(group_K[order_K], np.arange(len(key_G)))]]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for group, key in enumerate(key_G.tolist()):
        row, position = int(example_G[group]), int(position_N[example_G[group]])
        found.setdefault((key >> 48, (key >> 32) & 0xFFFF), []).append(
            {
                "token_id": key & 0xFFFFFFFF,
                "mass": float(mass_G[group]),
                "policy_mass": float(policy_G[group]),
                "count": int(count_G[group]),
                "position": position,
                "context": joined["token_N"][row - min(position, CONTEXT_TOKENS) : row].tolist(),
            }
        )
    return found


def mask(text: str) -> str:
    """Hides a text's content and keeps its shape: every letter and digit becomes a dot."""
    return re.sub(r"\w", "\N{BULLET}", text)
