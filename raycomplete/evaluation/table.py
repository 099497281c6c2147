"""Rows of the closing table, as plain strings; whoever prints it chooses the looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raycomplete.runtime.types import MODEL_ROLES


def closing_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Depth by model with 95 % intervals, then mean, other attacks, utility, refusal of harmless prompts, benchmarks.

    Attacks and over-refusal stand in one table, so that a model that refuses everything is seen to fail.

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
    for name, by_role in summary.get("attacks", {}).items():
        rows += _attack_rows(name, by_role, roles)
    for label, key in (
        ("utility", "utility"),
        ("over-refusal (borderline)", "over_refusal"),
        ("refusal (benign)", "benign_refusal"),
    ):
        if summary.get(key):
            rows.append([label, *(rate_text(summary[key].get(role)) for role in roles)])
        if key == "over_refusal":
            rows += _source_rows(summary.get("over_refusal_by_source", {}), roles)
    if nll := summary.get("benign_nll"):
        rows.append(["benign NLL, nats a token", *(nll_text(nll.get(role)) for role in roles)])
    for name, by_role in summary.get("capabilities", {}).items():
        for label, key in (("accuracy", "accuracy"), ("refused", "refused")):
            values = (rate_text(by_role[role][key]) if role in by_role else "-" for role in roles)
            rows.append([f"{name.upper()}, {label}", *values])
    return rows


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """`"12.0 % [7.0, 19.8]"`; a dash where nothing was measured."""
    if rate is None or not rate["n"]:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def nll_text(nll: Mapping[str, Any] | None) -> str:
    """`"0.421 [0.389, 0.455]"`; a dash where nothing was measured."""
    return "-" if nll is None else f"{nll['nats_per_token']:.3f} [{nll['low']:.3f}, {nll['high']:.3f}]"


def _source_rows(by_source: Mapping[str, Any], roles: Sequence[str]) -> list[list[str]]:
    """A row for each file; none where one file is all there is."""
    if len(by_source) < 2:
        return []
    return [
        [f"over-refusal, {source}", *(rate_text(by_role.get(role)) for role in roles)]
        for source, by_role in by_source.items()
    ]


def _attack_rows(name: str, by_role: Mapping[str, Any], roles: Sequence[str]) -> list[list[str]]:
    """Mean and, where a behaviour was tried more than once, worst of n; the depth curve has rows of its own."""
    blocks = [by_role.get(role) for role in roles]
    label = f"{name}{' (reduced)' if any(block and block['reduced'] for block in blocks) else ''}"
    rows = []
    if name != "prefill":
        rows.append([label, *(rate_text(block and block["mean"]) for block in blocks)])
        if any(block and block["trials"] > block["n"] for block in blocks):
            rows.append([f"{label}, worst of n", *(rate_text(block and block["worst_of_n"]) for block in blocks)])
    if any(block and block["corrected"] for block in blocks):
        rows.append([f"{label}, judge corrected", *(rate_text(block and block["corrected"]) for block in blocks)])
    return rows
