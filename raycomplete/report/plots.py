"""Figures of a run and of a diagnosis; each function returns None where its data is missing.

Figures are built without pyplot: it keeps a global list of figures, and needs a display on some machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter, ScalarFormatter

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
_CHANGED = ("deficit", "kl_to_base", "unfinished_mass")
_COLUMNS = ["position", "mean", "low", "high", "n"]


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
    """Deficit, KL to base and unfinished mass by response position, aligned against student."""
    positions = profile.get("positions")
    if not positions:
        return None
    blank, profiles = [None] * len(positions), {}
    for role in (role for role in ("aligned", "student") if role in profile):
        curves = {name: {"mean": profile[role][name], "low": blank, "high": blank} for name in _CHANGED}
        profiles[role] = {"n": profile[role].get("n", blank), **curves}
    figure, _, rows = _profiles(profiles, _CHANGED)
    caption = (
        "Along harmful responses, by position: the deficit exp(-KL / kappa) with "
        f"kappa = {profile.get('kappa', '?')}, near 1 where nothing was changed, the distance from the base, and the "
        "probability that the model puts on what base would say there and aligned not at the start "
        f"(tau = {profile.get('tau', '?')})."
    )
    return Plot("position_profile", caption, figure, rows)


def training_curves(metrics: Sequence[Mapping[str, Any]], terms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """The loss and its terms by step, on a logarithmic scale; the data holds the measures of the terms too."""
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


def where_it_stopped(diagnosis: Mapping[str, Any]) -> Plot:
    """Deficit, KL to base and unfinished mass along harmful responses, with the completion depth."""
    figure, panels, rows = _profiles(diagnosis["kinds"]["harmful"]["profile"], _CHANGED)
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
    shown = ("agreement", "refusal_probability", "base_favored_count")
    figure, _, rows = _profiles(diagnosis["kinds"]["harmful"]["profile"], shown)
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
        _positions(axes, max(len(found[measure]["n"]) for found in roles.values()))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"gradient norm,\n{label}")
    panels[-1].set_xlabel("position in the answer (tokens)")
    legend_above(figure, panels[0])
    factors = ", ".join(f"{found['preference_factor']:.2g} at {role}" for role, found in roles.items())
    caption = (
        "Norm of each position's contribution to the gradient of safety losses at each model's weights (at base: what "
        f"safety training saw first), along {gradient['pairs']} refusals of the aligned model and along the compliant "
        "answers that a preference loss rejects; a preference loss multiplies both with one factor, here "
        f"{factors}. Lines are exact in the output head. Bands are 95 % intervals over prompts."
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


def _profiles(profiles: Mapping[str, Any], metrics: Sequence[str]) -> tuple[Figure, Any, list[Row]]:
    """One panel for each metric, one curve for each role."""
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


def _curve(axes: Any, found: Mapping[str, Any], color: str, dashes: Any, label: str) -> None:
    at = np.arange(len(found["mean"]))
    axes.fill_between(at, gaps(found["low"]), gaps(found["high"]), color=color, alpha=0.18, lw=0)
    axes.plot(at, gaps(found["mean"]), label=label, color=color, linestyle=dashes, linewidth=1.7)


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
