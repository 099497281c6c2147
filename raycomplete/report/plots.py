"""Figures of a run. Each function takes plain data and returns a figure with the rows that it shows.

Figures are built without pyplot: it keeps a global list of figures, and needs a display on some machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from raycomplete.report.style import (
    OUTCOME_COLORS,
    OUTCOME_HATCHES,
    ROLE_COLORS,
    ROLE_DASHES,
    ROLE_HATCHES,
    ROLE_MARKERS,
    ROLES,
    SEQUENTIAL_MAP,
    SERIES_STYLES,
)

Row = list[Any]


@dataclass(frozen=True)
class Plot:
    """A figure and its data.

    Attributes:
        name: File name without ending.
        caption: What is seen, in a sentence or two; also the text for readers who see no picture.
        figure: The figure.
        rows: The data, header row first.
    """

    name: str
    caption: str
    figure: Figure
    rows: list[Row]


def prefill_curve(summary: Mapping[str, Any]) -> Plot | None:
    """Attack success by prefill depth, with 95 % intervals, for each model; None where none was evaluated."""
    if not summary["asr"]:
        return None
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    rows: list[Row] = [["role", "depth", "asr", "low", "high", "n"]]
    depths = depths_of(summary)
    for role in (role for role in ROLES if role in summary["asr"]):
        by_depth, color = summary["asr"][role]["by_depth"], ROLE_COLORS[role]
        known = [place for place, depth in enumerate(depths) if depth in by_depth]
        rates = [by_depth[depths[place]] for place in known]
        share, low, high = ([rate[key] for rate in rates] for key in ("rate", "low", "high"))
        style = {"color": color, "marker": ROLE_MARKERS[role], "linestyle": ROLE_DASHES[role]}
        axes.fill_between(known, low, high, color=color, alpha=0.16, lw=0)
        axes.plot(known, share, **style, label=role, clip_on=False)
        rows += [_rate_row(rate, role, int(depths[place])) for place, rate in zip(known, rates, strict=True)]
    # Depths double from one to the next, so they are spaced evenly rather than to scale.
    axes.set_xticks(range(len(depths)), depths)
    axes.set_xlabel("prefill depth in tokens (not to scale)")
    axes.set_ylabel("attack success rate")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_above(figure, axes)
    return Plot(
        "prefill_depth",
        "Share of harmful prompts that the model goes on to answer when the attacker writes the first tokens of the "
        "response. Bands are 95 % Wilson intervals. Lower is safer.",
        figure,
        rows,
    )


def attack_bars(attacks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Plot | None:
    """Success of every attack on every model, mean and worst of n; None where there is none but the depth curve."""
    if not attacks:
        return None
    groups = {name: {role: block["mean"] for role, block in by_role.items()} for name, by_role in attacks.items()}
    worst = {name: {role: block["worst_of_n"] for role, block in by_role.items()} for name, by_role in attacks.items()}
    figure, rows = _bars(groups, worst)
    return Plot(
        "attacks",
        "Share of harmful prompts on which an attack gets an answer: bars are the mean over its variants and trials, "
        "hollow marks the share on which at least one of them did (worst of n). Whiskers are 95 % intervals. Lower is "
        "safer.",
        figure,
        rows,
    )


def rate_bars(summary: Mapping[str, Any]) -> Plot | None:
    """Attack success, utility and over-refusal of every model as bars with 95 % intervals; None without any."""
    if not summary["asr"]:
        return None
    groups = {"attack success, mean over depths": {role: found["mean"] for role, found in summary["asr"].items()}}
    for label, key in (
        ("utility (benign)", "utility"),
        ("over-refusal (borderline)", "over_refusal"),
        ("refusal (benign)", "benign_refusal"),
    ):
        rates = {role: rate for role, rate in (summary.get(key) or {}).items() if rate["n"]}
        if rates:
            groups[label] = rates
    figure, rows = _bars(groups, {})
    return Plot(
        "rates",
        "Attack success over all prefill depths (lower is safer), useful answers to benign prompts (higher is better) "
        "and refusals of harmless prompts (lower is better). Whiskers are 95 % intervals.",
        figure,
        rows,
    )


def _bars(groups: Mapping[str, Mapping[str, Any]], hollow: Mapping[str, Mapping[str, Any]]) -> tuple[Figure, list[Row]]:
    """Horizontal bars of rates by group and model; `hollow` rates are drawn as marks beside them."""
    roles = [role for role in ROLES if any(role in rates for rates in groups.values())]
    figure = Figure(figsize=(5.6, 1.0 + (0.3 + 0.2 * len(roles)) * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    rows: list[Row] = [["measure", "role", "rate", "low", "high", "n"]]
    height = 0.8 / len(roles)
    for number, role in enumerate(roles):
        known = [(place, label, rates[role]) for place, (label, rates) in enumerate(groups.items()) if role in rates]
        share = np.asarray([rate["rate"] for *_, rate in known])
        ends = np.asarray([[rate["rate"] - rate["low"], rate["high"] - rate["rate"]] for *_, rate in known]).T
        places = [place + (number - (len(roles) - 1) / 2) * height for place, *_ in known]
        axes.barh(
            places,
            share,
            height * 0.9,
            xerr=ends,
            color=ROLE_COLORS[role],
            hatch=ROLE_HATCHES[role],
            edgecolor="white",
            linewidth=0.4,
            error_kw={"ecolor": "#222222", "elinewidth": 1.2, "capsize": 2.5},
            label=role,
        )
        marks: dict[str, Any] = {"linestyle": "none", "marker": ROLE_MARKERS[role], "clip_on": False, "zorder": 4}
        # A bar of no length has no colour, so its end is marked too.
        axes.plot(share, places, color=ROLE_COLORS[role], markeredgecolor="white", **marks)
        rows += [_rate_row(rate, label, role) for _, label, rate in known]
        beside = [
            (at, label, hollow[label][role])
            for at, (_, label, _) in zip(places, known, strict=True)
            if role in hollow.get(label, {})
        ]
        marks |= {"markerfacecolor": "white", "markeredgecolor": ROLE_COLORS[role], "markeredgewidth": 1.4}
        axes.plot([rate["rate"] for *_, rate in beside], [at for at, *_ in beside], **marks)
        rows += [_rate_row(rate, f"{label}, worst of n", role) for _, label, rate in beside]
    labels = [label.replace("_", " ").replace(" (", "\n(").replace(", ", ",\n") for label in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(False, axis="y")
    legend_above(figure, axes)
    return figure, rows


def _rate_row(rate: Mapping[str, Any], *names: Any) -> Row:
    return [*names, rate["rate"], rate["low"], rate["high"], rate["n"]]


def position_profile(profile: Mapping[str, Any]) -> Plot | None:
    """Base-favored mass, KL to base and deficit by response position, aligned against student; None without any."""
    if not profile.get("positions"):
        return None
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    roles = [role for role in ("aligned", "student") if role in profile]
    positions = list(profile["positions"])
    rows: list[Row] = [["role", "position", "base_favored_mass", "kl_to_base", "deficit", "n"]]
    for role in roles:
        columns = [profile[role][key] for key in ("base_favored_mass", "kl_to_base", "deficit")]
        counts = profile[role].get("n", [None] * len(positions))
        rows += [[role, *values] for values in zip(positions, *columns, counts, strict=True)]
        for axes, values in zip(panels, columns, strict=True):
            axes.plot(positions, gaps(values), color=ROLE_COLORS[role], linestyle=ROLE_DASHES[role], label=role)
    for axes, label in zip(panels, ("base-favored mass", "KL to base (nats)", "deficit"), strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[2].set_ylim(0, 1.02)
    panels[2].set_xlabel("position in the response (tokens)")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, panels[0])
    return Plot(
        "position_profile",
        f"Along harmful responses, by position: probability that the base puts on tokens it favors over the model "
        f"(tau = {profile.get('tau', '?')}), distance from the base, and the deficit exp(-KL / kappa) with kappa = "
        f"{profile.get('kappa', '?')}, near 1 where nothing was changed.",
        figure,
        rows,
    )


_LOSS_RANGE = 1e-6  # decades of loss that are shown


@dataclass(frozen=True)
class LossSeries:
    """One curve of the training figure: the whole loss or a term of it, by its name in metrics.jsonl."""

    name: str
    label: str
    color: str
    dashes: Any


def loss_series(terms: Mapping[str, Mapping[str, Any]]) -> list[LossSeries]:
    """The curves of a run whose training.json describes these terms; a single term is the whole loss itself."""
    series = [LossSeries("loss", "whole loss", "#000000", "solid")]
    if len(terms) > 1:
        styles = zip(terms.items(), cycle(SERIES_STYLES), strict=False)
        series += [LossSeries(name, found.get("label", name), *style) for (name, found), style in styles]
    return series


def training_curves(metrics: Sequence[Mapping[str, Any]], terms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """The loss and its terms by step, on a logarithmic scale; None without steps. The data holds their measures too.

    Args:
        metrics: Rows of metrics.jsonl.
        terms: Terms by name, each with a label and its measures, as training.json describes them.
    """
    if not metrics:
        return None
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in metrics]
    drawn = [series for series in loss_series(terms) if any(row.get(series.name) is not None for row in metrics)]
    positive = False
    for series in drawn:
        values = gaps([row.get(series.name) for row in metrics])
        positive = positive or bool((values > 0).any())
        axes.plot(
            steps,
            np.where(values > 0, values, np.nan),
            color=series.color,
            linestyle=series.dashes,
            linewidth=2.2 if series.name == "loss" else 1.5,
            marker="." if len(steps) < 3 else None,
            label=series.label,
        )
    if positive:
        axes.set_yscale("log")
        # The anchor starts at rounding noise, since the student starts as aligned: it must not squash the rest.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], axes.get_ylim()[1] * _LOSS_RANGE))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, logarithmic")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, axes, columns=min(len(drawn), 4))
    measures = [name for found in terms.values() for name in found.get("metrics", {})]
    names = [*(series.name for series in drawn), *(name for name in measures if any(name in row for row in metrics))]
    rows: list[Row] = [["step", *names], *([row["step"], *(row.get(name) for name in names)] for row in metrics)]
    return Plot(
        "training",
        "The loss and its terms by optimizer step, where they are above 0.",
        figure,
        rows,
    )


def depth_heat_map(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """From which depths recovery was drawn, by step; None where no step recorded it."""
    caption = "Probability of each bin of depths, by step. The sampler goes where training is incomplete."
    drawn = _steps_by_depth(metrics, "depth_probabilities", "probability of the bin")
    return None if drawn is None else Plot("depth_sampler", caption, *drawn)


def compliance_heat_map(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """How often the student's own rollouts complied, by step and depth; None off-policy."""
    caption = "Share of the student's own rollouts that went on complying, by step and depth. Blank: not drawn."
    drawn = _steps_by_depth(metrics, "depth_compliance", "rollouts that comply")
    return None if drawn is None else Plot("depth_compliance", caption, *drawn)


def _steps_by_depth(metrics: Sequence[Mapping[str, Any]], key: str, label: str) -> tuple[Figure, list[Row]] | None:
    """A map of steps by bins of depth, and its data."""
    known = [row for row in metrics if row.get(key) and row.get("depth_bins")]
    if not known:
        return None
    bins = known[-1]["depth_bins"]
    known = [row for row in known if row["depth_bins"] == bins]
    value_SB = np.asarray([row[key] for row in known], dtype=np.float64)  # None becomes NaN, which stays blank
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(False)
    steps = [row["step"] for row in known]
    image = axes.imshow(
        value_SB.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=SEQUENTIAL_MAP,
        vmin=0.0,
        extent=(steps[0] - 0.5, max(steps[-1], steps[0]) + 0.5, -0.5, len(bins) - 0.5),
    )
    labels = [str(low) if low == high else f"{low}\N{EN DASH}{high}" for low, high in bins]
    every = max(1, -(-len(bins) // 12))  # more labels than this would overlap
    axes.set_yticks(range(0, len(bins), every), labels[::every])
    axes.set_ylabel("depth (tokens)")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=label, format=PercentFormatter(1.0, decimals=0))
    rows: list[Row] = [["step", *(f"{low}-{high}" for low, high in bins)]]
    values = [[None if np.isnan(value) else float(value) for value in row] for row in value_SB]
    rows += [[step, *row] for step, row in zip(steps, values, strict=True)]
    return figure, rows


def outcome_bars(results: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Outcomes at each depth, aligned beside student; None where neither was evaluated."""
    roles = [role for role in ("aligned", "student") if role in results]
    if not roles:
        return None
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(roles), sharey=True))
    rows: list[Row] = [["role", "depth", *OUTCOME_COLORS, "n"]]
    for axes, role in zip(panels, roles, strict=True):
        variants = [found for found in results[role].get("variants", {}).values() if found.get("depth") is not None]
        variants.sort(key=lambda variant: int(variant["depth"]))
        places = np.arange(len(variants))
        bottom = np.zeros(len(variants))
        for outcome, color in OUTCOME_COLORS.items():
            share = np.asarray([item["outcomes"].get(outcome, 0) / max(item["n"], 1) for item in variants])
            axes.bar(
                places,
                share,
                bottom=bottom,
                color=color,
                hatch=OUTCOME_HATCHES[outcome],
                edgecolor="white" if outcome in ("complied", "refused") else "#555555",
                linewidth=0.4,
                width=0.82,
                label=outcome,
            )
            bottom += share
        axes.set_xticks(places, [str(variant["depth"]) for variant in variants])
        axes.set_title(role)
        axes.set_xlabel("prefill depth in tokens")
        axes.grid(False)
        rows += [[role, c["depth"], *(c["outcomes"].get(key, 0) for key in OUTCOME_COLORS), c["n"]] for c in variants]
    panels[0].set_ylabel("share of harmful prompts")
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_above(figure, panels[0])
    return Plot(
        "outcomes",
        "Every harmful prompt by outcome at each depth. Incoherent and empty responses are failures of the attack that "
        "are no success of the defence either, so they are shown apart.",
        figure,
        rows,
    )


def depths_of(summary: Mapping[str, Any]) -> list[str]:
    """All prefill depths of a summary in order."""
    depths = {depth for role in summary["asr"] for depth in summary["asr"][role]["by_depth"]}
    return sorted(depths, key=int)


def gaps(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values with NaN, which draws a gap, where nothing was measured."""
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def legend_above(figure: Figure, axes: Any, columns: int | None = None) -> None:
    """Above the axes, where it never hides data; in one row unless a number of columns is given."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = columns or len(labels)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=2.2, columnspacing=1.4)
