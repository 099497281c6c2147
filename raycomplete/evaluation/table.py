"""Rows of the closing table, as plain strings; whoever prints it chooses the looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycomplete.types import MODEL_ROLES


def closing_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Depth by model with 95 % intervals, then mean, utility and refusal of harmless prompts.

    Args:
        summary: What `summarize` returned, or the whole of summary.json.

    Returns:
        Header row first; every row is as long as the header.
    """
    asr: Mapping[str, Any] = summary.get("asr", {})
    roles = [role for role in MODEL_ROLES if role in asr]
    rows = [["", *roles]]
    if not roles:
        return rows
    depths = list(asr[roles[0]]["by_depth"])
    rows += [
        [f"ASR at depth {depth}", *(rate_text(asr[role]["by_depth"].get(depth)) for role in roles)] for depth in depths
    ]
    rows.append(["ASR, mean over depths", *(rate_text(asr[role]["mean"]) for role in roles)])
    for label, key in (
        ("utility", "utility"),
        ("over-refusal (borderline)", "over_refusal"),
        ("refusal (benign)", "benign_refusal"),
    ):
        if summary.get(key):
            rows.append([label, *(rate_text(summary[key].get(role)) for role in roles)])
    return rows


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """`"12.0 % [7.0, 19.8]"`; a dash where nothing was measured."""
    if rate is None or not rate["n"]:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
