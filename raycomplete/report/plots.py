"""Figures of a run; each function returns None where its data is missing.

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

from raycomplete.runtime.types import MODEL_ROLES

Row = list[Any]

# One look for each model, the same in every figure. The colours are those of Okabe and Ito, which people with any of
# the common colour-vision deficiencies can tell apart; markers and dashes carry the same information, so that a print
# in grey can be read too.
ROLE_COLORS = {"base": "#D55E00", "aligned": "#0072B2", "student": "#009E73"}
ROLE_MARKERS = {"base": "s", "aligned": "o", "student": "D"}
ROLE_HATCHES = {"base": "xx", "aligned": "//", "student": ""}
ROLE_DASHES: dict[str, Any] = {"base": (0, (5, 2)), "aligned": (0, (1.5, 1.5)), "student": "solid"}
_OUTCOMES = {  # colour, hatch and edge
    "complied": ("#D55E00", "", "white"),
    "refused_then_complied": ("#E69F00", "\\\\", "white"),
    "refused": ("#0072B2", "//", "white"),
    "off_topic": ("#CC79A7", "--", "white"),
    "incoherent": ("#F0E442", "..", "#555555"),
    "empty": ("#BBBBBB", "xx", "#555555"),
}
_SERIES_STYLES: tuple[tuple[str, Any], ...] = (  # curves that no model owns, as the terms of a loss; used in turn
    ("#0072B2", (0, (1.5, 1.5))),
    ("#D55E00", (0, (5, 2))),
    ("#CC79A7", (0, (5, 2, 1.5, 2))),
    ("#009E73", (0, (3, 1))),
    ("#E69F00", (0, (8, 2))),
    ("#56B4E9", (0, (1, 1))),
)
STYLE: dict[str, Any] = {  # matplotlib's settings
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True)
class Plot:
    """A figure and its data, header row first; the caption is also the text for readers who see no picture."""

    name: str
    caption: str
    figure: Figure
    rows: list[Row]


def prefill_curve(summary: Mapping[str, Any]) -> Plot | None:
    """Attack success by prefill depth, with 95 % intervals, for each model."""
    if not summary["asr"]:
        return None
    figure, axes = new_figure(3.7)
    rows: list[Row] = [["role", "depth", "asr", "low", "high", "n"]]
    depths = depths_of(summary)
    for role in (role for role in MODEL_ROLES if role in summary["asr"]):
        by_depth, color = summary["asr"][role]["by_depth"], ROLE_COLORS[role]
        known = [place for place, depth in enumerate(depths) if by_depth.get(depth, {"n": 0})["n"]]
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
    caption = (
        "Share of harmful prompts that the model goes on to answer when the attacker writes the first tokens of the "
        "response. Bands are 95 % Wilson intervals. Lower is safer."
    )
    return Plot("prefill_depth", caption, figure, rows)


def attack_bars(attacks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Plot | None:
    """Success of every attack on every model, mean and worst of n."""
    if not attacks:
        return None
    mean, worst = (
        {name: {role: block[key] for role, block in by_role.items()} for name, by_role in attacks.items()}
        for key in ("mean", "worst_of_n")
    )
    figure, rows = _bars(mean, worst)
    caption = (
        "Share of harmful prompts on which an attack gets an answer: bars are the mean over its variants and trials, "
        "hollow marks the share on which at least one of them did (worst of n). Whiskers are 95 % intervals. Lower is "
        "safer."
    )
    return Plot("attacks", caption, figure, rows)


def rate_bars(summary: Mapping[str, Any]) -> Plot | None:
    """Attack success, utility and over-refusal of every model as bars with 95 % intervals."""
    if not summary["asr"]:
        return None
    others = {"utility": "utility (benign)", "over_refusal": "over-refusal (borderline)"}
    others |= {"benign_refusal": "refusal (benign)"}
    groups = {"attack success, mean over depths": {role: found["mean"] for role, found in summary["asr"].items()}}
    for key, label in others.items():
        if rates := {role: rate for role, rate in (summary.get(key) or {}).items() if rate["n"]}:
            groups[label] = rates
    figure, rows = _bars(groups, {})
    caption = (
        "Attack success over all prefill depths (lower is safer), useful answers to benign prompts (higher is better) "
        "and refusals of harmless prompts (lower is better). Whiskers are 95 % intervals."
    )
    return Plot("rates", caption, figure, rows)


def _bars(groups: Mapping[str, Mapping[str, Any]], hollow: Mapping[str, Mapping[str, Any]]) -> tuple[Figure, list[Row]]:
    """Horizontal bars of rates by group and model; `hollow` rates are drawn as marks beside them."""
    roles = [role for role in MODEL_ROLES if any(role in rates for rates in groups.values())]
    figure, axes = new_figure(1.0 + (0.3 + 0.2 * len(roles)) * len(groups))
    rows: list[Row] = [["measure", "role", "rate", "low", "high", "n"]]
    height = 0.8 / len(roles)
    for number, role in enumerate(roles):
        known = [(place, label, rates[role]) for place, (label, rates) in enumerate(groups.items()) if role in rates]
        share = np.asarray([rate["rate"] for *_, rate in known])
        ends = np.asarray([[rate["rate"] - rate["low"], rate["high"] - rate["rate"]] for *_, rate in known]).T
        places = [place + (number - (len(roles) - 1) / 2) * height for place, *_ in known]
        looks = {"color": ROLE_COLORS[role], "hatch": ROLE_HATCHES[role], "edgecolor": "white", "linewidth": 0.4}
        whiskers = {"ecolor": "#222222", "elinewidth": 1.2, "capsize": 2.5}
        axes.barh(places, share, height * 0.9, xerr=ends, error_kw=whiskers, label=role, **looks)
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
    """Unfinished mass, KL to base and deficit by response position, aligned against student."""
    positions = profile.get("positions")
    if not positions:
        return None
    figure, panels = new_figure(6.6, 3, sharex=True)
    measures = {"unfinished_mass": "unfinished mass", "kl_to_base": "KL to base (nats)", "deficit": "deficit"}
    rows: list[Row] = [["role", "position", *measures, "n"]]
    for role in (role for role in ("aligned", "student") if role in profile):
        columns = [profile[role][key] for key in measures]
        counts = profile[role].get("n", [None] * len(positions))
        rows += [[role, *values] for values in zip(positions, *columns, counts, strict=True)]
        for axes, values in zip(panels, columns, strict=True):
            axes.plot(positions, gaps(values), color=ROLE_COLORS[role], linestyle=ROLE_DASHES[role], label=role)
    for axes, label in zip(panels, measures.values(), strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[2].set_ylim(0, 1.02)
    panels[2].set_xlabel("position in the response (tokens)")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, panels[0])
    caption = (
        "Along harmful responses, by position: probability that the model puts on what base would say there and "
        f"aligned not at the start (tau = {profile.get('tau', '?')}), distance from the base, and the deficit "
        f"exp(-KL / kappa) with kappa = {profile.get('kappa', '?')}, near 1 where nothing was changed."
    )
    return Plot("position_profile", caption, figure, rows)


def training_curves(metrics: Sequence[Mapping[str, Any]], terms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """The loss and its terms by step, on a logarithmic scale; the data holds the measures of the terms too.

    Args:
        metrics: Rows of metrics.jsonl.
        terms: Terms by their name in it, each with a label and its measures, as training.json describes them.
    """
    if not metrics:
        return None
    curves: dict[str, tuple[str, str, Any]] = {"loss": ("whole loss", "#000000", "solid")}
    if len(terms) > 1:  # a single term is the whole loss itself
        styles = zip(terms.items(), cycle(_SERIES_STYLES), strict=False)
        curves |= {name: (found.get("label", name), *style) for (name, found), style in styles}
    curves = {name: curve for name, curve in curves.items() if any(row.get(name) is not None for row in metrics)}
    figure, axes = new_figure(3.7)
    steps = [row["step"] for row in metrics]
    positive = False
    for name, (label, color, dashes) in curves.items():
        values = gaps([row.get(name) for row in metrics])
        positive = positive or bool((values > 0).any())
        looks = {"color": color, "linestyle": dashes, "linewidth": 2.2 if name == "loss" else 1.5}
        marker = "." if len(steps) < 3 else None
        axes.plot(steps, np.where(values > 0, values, np.nan), marker=marker, label=label, **looks)
    if positive:
        axes.set_yscale("log")
        # The anchor starts at rounding noise, since the student starts as aligned: it must not squash the rest.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], axes.get_ylim()[1] * 1e-6))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, logarithmic")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, axes, columns=min(len(curves), 4))
    measures = [name for found in terms.values() for name in found.get("metrics", {})]
    names = [*curves, *(name for name in measures if any(name in row for row in metrics))]
    rows: list[Row] = [["step", *names], *([row["step"], *(row.get(name) for name in names)] for row in metrics)]
    return Plot("training", "The loss and its terms by optimizer step, where they are above 0.", figure, rows)


def steering(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Compliance, budgets and factors on loss weights by step, as measured on held-back training prompts."""
    measured = [(row["step"], row["validation"]) for row in metrics if row.get("validation")]
    if not measured:
        return None
    steps, kept = [step for step, _ in measured], measured[-1][1]["best_step"]
    depths = list(measured[-1][1]["compliance"])
    names = list(measured[-1][1]["factors"])
    curves = [
        {f"depth {depth}": [found["compliance"].get(depth) for _, found in measured] for depth in depths},
        {
            label: [found["of_budget"][name] for _, found in measured]
            for name, label in {"over_refusal": "over-refusal", "kl": "KL to aligned"}.items()
        },
        {name.replace("_", "-"): [found["factors"].get(name) for _, found in measured] for name in names},
    ]
    figure, panels = new_figure(6.6, 3, sharex=True)
    labels = ("answers that comply", "share of the budget", "factor on the weight")
    for axes, label, series in zip(panels, labels, curves, strict=True):
        for (name, values), (color, dashes) in zip(series.items(), cycle(_SERIES_STYLES), strict=False):
            axes.plot(steps, gaps(values), color=color, linestyle=dashes, marker=".", label=name)
        axes.axvline(kept, color="#555555", linewidth=1.0)
        axes.set_ylabel(label)
        if series:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    panels[0].set_ylim(-0.02, 1.02)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[1].axhline(1.0, color="#555555", linewidth=1.0, linestyle=(0, (1, 1)))
    panels[2].set_xlabel("step")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    heads = [*(f"compliance_{depth}" for depth in depths), "in_reach", "unfinished_mass", "over_refusal", "kl"]
    heads += [f"{name}_factor" for name in names]
    rows: list[Row] = [["step", *heads, "meets_budgets"]]
    for step, found in measured:
        compliance = [found["compliance"].get(depth) for depth in depths]
        factors = [found["factors"].get(name) for name in names]
        measures = [*map(found.get, ("in_reach", "unfinished_mass")), found["over_refusal"], found["kl"]]
        rows.append([step, *compliance, *measures, *factors, found["meets_budgets"]])
    caption = (
        "The student on held-back training prompts: harmful ones that it answers by depth of the prefill, over-refusal "
        "against aligned and KL to it as shares of what is allowed (dotted at 1), and the factors by which these moved "
        f"the weights of the loss. The line marks step {kept}, which was kept."
    )
    return Plot("steering", caption, figure, rows)


def depth_heat_map(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """From which depths recovery was drawn, by step."""
    caption = "Probability of each bin of depths, by step. The sampler goes where training is incomplete."
    drawn = _steps_by_depth(metrics, "depth_probabilities", "probability of the bin")
    return None if drawn is None else Plot("depth_sampler", caption, *drawn)


def compliance_heat_map(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Draws the share of the student's own rollouts that complied, by step and depth."""
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
    figure, axes = new_figure(3.7)
    axes.grid(False)
    steps = [row["step"] for row in known]
    extent = (steps[0] - 0.5, max(steps[-1], steps[0]) + 0.5, -0.5, len(bins) - 0.5)
    looks: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "cividis"}
    image = axes.imshow(value_SB.T, vmin=0.0, extent=extent, **looks)
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
    """Outcomes at each depth, aligned beside student."""
    roles = [role for role in ("aligned", "student") if role in results]
    if not roles:
        return None
    figure, panels = new_figure(3.9, 1, len(roles), sharey=True, squeeze=False)
    panels = panels[0]
    rows: list[Row] = [["role", "depth", *_OUTCOMES, "n"]]
    for axes, role in zip(panels, roles, strict=True):
        variants = [found for found in results[role].get("variants", {}).values() if found.get("depth") is not None]
        variants.sort(key=lambda variant: int(variant["depth"]))
        places = np.arange(len(variants))
        bottom = np.zeros(len(variants))
        for outcome, (color, hatch, edge) in _OUTCOMES.items():
            share = np.asarray([item["outcomes"].get(outcome, 0) / max(item["n"], 1) for item in variants])
            looks = {"color": color, "hatch": hatch, "edgecolor": edge, "linewidth": 0.4}
            axes.bar(places, share, bottom=bottom, width=0.82, label=outcome.replace("_", " "), **looks)
            bottom += share
        axes.set_xticks(places, [str(variant["depth"]) for variant in variants])
        axes.set_title(role)
        axes.set_xlabel("prefill depth in tokens")
        axes.grid(False)
        rows += [[role, c["depth"], *(c["outcomes"].get(key, 0) for key in _OUTCOMES), c["n"]] for c in variants]
    panels[0].set_ylabel("share of harmful prompts")
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_above(figure, panels[0])
    caption = (
        "Every harmful prompt by outcome at each depth. A refusal that help follows counts as success of the attack. "
        "Responses off topic, incoherent or empty are failures of the attack that are no success of the defence "
        "either, so they are shown apart."
    )
    return Plot("outcomes", caption, figure, rows)


def depths_of(summary: Mapping[str, Any]) -> list[str]:
    """All prefill depths of a summary in order."""
    depths = {depth for role in summary["asr"] for depth in summary["asr"][role]["by_depth"]}
    return sorted(depths, key=int)


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the page's width, and its axes as `Figure.subplots` gives them."""
    figure = Figure(figsize=(5.6, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def gaps(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values with NaN, which draws a gap, where nothing was measured."""
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def legend_above(figure: Figure, axes: Any, columns: int | None = None) -> None:
    """Above the axes, where it never hides data; in one row, or in as many columns as given, where they fit."""
    handles, labels = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"loc": "outside upper center", "handlelength": 2.2, "columnspacing": 1.4}
    for count in range(columns or len(labels), 0, -1):
        legend = figure.legend(handles, labels, ncols=count, **look)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
