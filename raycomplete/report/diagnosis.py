"""Figures and tables of a diagnosis: profiles by position with intervals, the control, the gradient, the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from raycomplete.report.plots import ROLE_COLORS, ROLE_DASHES, ROLE_MARKERS, Plot, Row, gaps, legend_above, new_figure

_LABELS = {
    "unfinished_mass": "unfinished mass",
    "deficit": "deficit",
    "kl_to_base": "KL to base (nats)",
    "base_favored_mass": "base-favored mass",
    "agreement": "argmax agreement",
    "refusal_probability": "refusal-token\nprobability",
    "base_favored_count": "base-favored tokens",
}
_SHARES = ("unfinished_mass", "deficit", "base_favored_mass", "agreement", "refusal_probability")
_KIND_DASHES: dict[str, Any] = {"harmful": "solid", "benign": (0, (5, 2))}
_COLUMNS = ["position", "mean", "low", "high", "n"]


def where_it_stopped(diagnosis: Mapping[str, Any]) -> Plot:
    """Deficit, KL to base and unfinished mass along harmful responses, with the completion depth."""
    figure, panels, rows = _profiles(diagnosis, ("deficit", "kl_to_base", "unfinished_mass"))
    settings = diagnosis["settings"]
    panels[0].axhline(settings["threshold"], color="#777777", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    for role, depth in diagnosis["kinds"]["harmful"]["completion_depth"].items():
        if depth["depth"] is not None:
            panels[0].axvline(depth["depth"], color=ROLE_COLORS[role], linewidth=1, alpha=0.7, zorder=1)
    caption = (
        "Along harmful responses with a compliant continuation, by position. Deficit exp(-KL / kappa), kappa = "
        f"{settings['kappa']:g}, is 1 where the model still is its base; its dotted line is the threshold of the "
        "completion depth, the vertical line the depth itself. Unfinished mass is the model's probability of tokens "
        "that base says there more than aligned says them at the start of its answer "
        f"(tau = {settings['tau']:g}, margin = {settings['margin']:g} nats). Bands are 95 % intervals over prompts."
    )
    return Plot("diagnosis_profile", caption, figure, rows)


def what_it_does(diagnosis: Mapping[str, Any]) -> Plot:
    """Agreement of the argmax, refusal-token probability and count of base-favored tokens along harmful responses."""
    figure, _, rows = _profiles(diagnosis, ("agreement", "refusal_probability", "base_favored_count"))
    quoted = "\N{LEFT DOUBLE QUOTATION MARK}{}\N{RIGHT DOUBLE QUOTATION MARK}"
    tokens = ", ".join(map(quoted.format, diagnosis["refusal_tokens"][:6]))
    caption = (
        "Share of prompts on which model and base agree on the likeliest next token, probability of starting a refusal "
        f"at this position (tokens: {tokens or 'none found'}), and how many tokens the base favors. Bands are 95 % "
        "intervals over prompts."
    )
    return Plot("diagnosis_behaviour", caption, figure, rows)


def control(diagnosis: Mapping[str, Any]) -> Plot | None:
    """Harmful prompts beside benign ones; None where no benign prompt was measured."""
    kinds = {kind: found["profile"] for kind, found in diagnosis["kinds"].items() if found["profile"]}
    if "benign" not in kinds:
        return None
    figure, panels = new_figure(4.8, 2, sharex=True)
    rows: list[Row] = [["kind", "role", "metric", *_COLUMNS]]
    for axes, metric in zip(panels, ("kl_to_base", "deficit"), strict=True):
        longest = 0
        for kind, profiles in kinds.items():
            for role, profile in profiles.items():
                label = f"{role}, {kind}" if len(profiles) > 1 else kind
                _curve(axes, profile[metric], ROLE_COLORS[role], _KIND_DASHES[kind], label)
                rows += _rows([kind, role, metric], profile[metric], profile["n"])
                longest = max(longest, len(profile["n"]))
        _finish(axes, metric, longest)
    panels[-1].set_xlabel("position in the response (tokens)")
    legend_above(figure, panels[0], columns=2)
    caption = (
        "How far the models moved from base on harmful prompts and, as a control, along answers to harmless ones: a "
        "model that also moves there has changed more than its safety. Bands are 95 % intervals over prompts."
    )
    return Plot("diagnosis_control", caption, figure, rows)


def gradient_curve(gradient: Mapping[str, Any] | None) -> Plot | None:
    """Norm of each position's contribution to the gradient of safety losses; None where it was not measured."""
    if gradient is None:
        return None
    roles = gradient["roles"]
    figure, panels = new_figure(4.8, 2)
    rows: list[Row] = [["role", "measure", *_COLUMNS]]
    for role, found in roles.items():
        for measure, profile in found.items():
            if isinstance(profile, Mapping):
                rows += _rows([role, measure], profile, profile["n"])
    answers = {"sft_head": "safe answer", "rejected_head": "rejected answer"}
    for axes, (measure, label) in zip(panels, answers.items(), strict=True):
        for role, found in roles.items():
            _curve(axes, found[measure], ROLE_COLORS[role], ROLE_DASHES[role], f"at {role}")
            if measure == "sft_head" and "sft_all" in found:
                _curve(axes, found["sft_all"], ROLE_COLORS[role], ROLE_DASHES[role], "_", ROLE_MARKERS[role])
        _positions(axes, max(len(found[measure]["n"]) for found in roles.values()))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"gradient norm,\n{label}")
    panels[-1].set_xlabel("position in the answer (tokens)")
    legend_above(figure, panels[0])
    factors = ", ".join(f"{found['preference_factor']:.2g} at {role}" for role, found in roles.items())
    has_exact = any("sft_all" in found for found in roles.values())
    caption = (
        "Norm of each position's contribution to the gradient of safety losses at each model's weights (at base: what "
        f"safety training saw first), along {gradient['pairs']} refusals of the aligned model and along the compliant "
        "answers that a preference loss rejects; a preference loss multiplies both with one factor, here "
        f"{factors}. Lines are exact in the output head"
        + (f", marked lines exact in all parameters ({gradient.get('full_prompts')} prompts)" if has_exact else "")
        + ". Bands are 95 % intervals over prompts."
    )
    return Plot("gradient_signal", caption, figure, rows)


def token_tables(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Base-favored tokens by kind and policy: bands of positions with their tokens, for the page."""
    tables: dict[tuple[str, str], dict[str, Any]] = {}
    for item in diagnosis["tokens"]:
        kind, role = item["kind"], item["role"]
        table = tables.setdefault((kind, role), {"kind": kind, "role": role, "bands": {}})
        low, high = item["band"]
        table["bands"].setdefault(str(low) if low == high else f"{low}\N{EN DASH}{high}", []).append(item)
    return list(tables.values())


def token_rows(diagnosis: Mapping[str, Any]) -> list[Row]:
    """The same as one flat table, header row first."""
    names = ["kind", "role", "first", "last", "token", "token_id", "share", "count", "base_probability"]
    names += ["policy_probability", "position", "context"]
    items = [item | dict(zip(("first", "last"), item["band"], strict=True)) for item in diagnosis["tokens"]]
    return [list(names), *([item[name] for name in names] for item in items)]


def depth_words(depth: Mapping[str, Any]) -> str:
    """Writes a completion depth as `"1 (1 to 2)"`, or says that the deficit never exceeds its threshold."""
    beyond = f"beyond {depth['num_positions']}"
    if depth["depth"] is None:
        return beyond
    low, high = (beyond if end is None else str(end) for end in (depth["low"], depth["high"]))
    return f"{depth['depth']} ({low} to {high})"


def _profiles(diagnosis: Mapping[str, Any], metrics: Sequence[str]) -> tuple[Figure, Any, list[Row]]:
    """One panel for each metric, one curve for each policy."""
    profiles = diagnosis["kinds"]["harmful"]["profile"]
    figure, panels = new_figure(6.6, len(metrics), sharex=True)
    rows: list[Row] = [["role", "metric", *_COLUMNS]]
    for axes, metric in zip(panels, metrics, strict=True):
        for role, profile in profiles.items():
            _curve(axes, profile[metric], ROLE_COLORS[role], ROLE_DASHES[role], role)
            rows += _rows([role, metric], profile[metric], profile["n"])
        _finish(axes, metric, max(len(profile["n"]) for profile in profiles.values()))
    panels[-1].set_xlabel("position in the response (tokens)")
    legend_above(figure, panels[0])
    return figure, panels, rows


def _curve(axes: Any, found: Mapping[str, Any], color: str, dashes: Any, label: str, marker: str | None = None) -> None:
    at = np.arange(len(found["mean"]))
    if marker is None:  # marked curves rest on a few prompts, and their bands would cover all others
        axes.fill_between(at, gaps(found["low"]), gaps(found["high"]), color=color, alpha=0.18, lw=0)
    looks = {"color": color, "linestyle": dashes, "linewidth": 1.0 if marker else 1.7, "marker": marker, "ms": 3.5}
    axes.plot(at, gaps(found["mean"]), label=label, **looks)


def _rows(start: list[Any], found: Mapping[str, Any], counts: Sequence[int]) -> list[Row]:
    columns = zip(found["mean"], found["low"], found["high"], counts, strict=True)
    return [[*start, position, *values] for position, values in enumerate(columns)]


def _finish(axes: Any, metric: str, longest: int) -> None:
    axes.set_ylabel(_LABELS[metric])
    axes.set_ylim(bottom=min(0.0, -0.02 * axes.get_ylim()[1]))
    if metric in _SHARES:
        axes.set_ylim(-0.02, 1.03)  # a curve at 0 must not hide behind the axis
    _positions(axes, longest)


def _positions(axes: Any, longest: int) -> None:
    """Positions double from one tick to the next: what matters happens at the first few, and responses are long."""
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xlim(-0.08, max(longest - 1, 1))
    ticks = [0, *(2**power for power in range(12) if 2**power < longest)]
    if len(ticks) > 9:
        ticks = [0, 1, *(tick for tick in ticks if tick >= 4)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
