"""The pages of a study: tables in Markdown and HTML, and figures of all methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import cycle
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import PercentFormatter

from raycomplete.config.study import FROZEN, Study, StudyRun
from raycomplete.evaluation.summary import difference_text, rate_text
from raycomplete.report.html import render, section
from raycomplete.report.plots import STYLE, Plot, legend_above, new_figure
from raycomplete.report.study import (
    MEAN_OVER_ATTACKS,
    OVER_REFUSAL,
    SPARE_OVER_REFUSAL,
    depths_of,
    study_results,
)
from raycomplete.runtime.files import write_json, write_text

Table = tuple[str, list[list[str]]]
_PREFILL = "ASR, mean over depths"
_SUMMED = (MEAN_OVER_ATTACKS, _PREFILL, OVER_REFUSAL, "refusal (benign)", "utility")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "oDs^vP*X<>hd"
_PANELS = 3  # of a row of depth curves


def write_study(study: Study, finished: Sequence[StudyRun]) -> list[Table]:
    """Writes study.json, study.md, study.html and figures/ of a study from its finished runs.

    Returns:
        Each model's first and last table for a terminal: title and rows, the header first.

    Raises:
        DataError: A run folder lacks something, or runs cannot be compared.
    """
    results = study_results(study, finished)
    write_json(study.folder / "study.json", results)
    parts = []
    for model, found in results["models"].items():
        tables = _tables(results["reference"], found)
        with rc_context(STYLE):
            figures = [section(study.folder, *figure) for figure in _figures(model, found)]
        parts.append({"model": model, "tables": tables, "figures": figures, "notes": _notes(found), **found})
    missing = [run.name for run in study.runs if run not in finished]
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_text(study.folder / "study.md", _markdown(results["name"], parts, missing))
    page = render("study.html.j2", name=results["name"], written=written, parts=parts, missing=missing)
    write_text(study.folder / "study.html", page)
    ends = ((part["model"], *part["tables"][place]) for part in parts for place in (0, -1))
    return [(f"{model}: {title}", rows) for model, title, rows in ends]


def _tables(reference: str, found: Mapping[str, Any]) -> list[Table]:
    """All tables of a model: methods by headline, attacks by method, differences from aligned and from rivals."""
    rows: Mapping[str, Any] = found["rows"]
    measures = list(rows[FROZEN]["rates"])
    labels = list(rows)
    paid = ["steps", "kept steps", "training, s", "time of a token", "passes a token"]
    summed = [["", *_SUMMED, "off topic or babble", *paid, "seeds"]]
    for label, row in rows.items():
        rates = [rate_text(row["rates"].get(measure)) for measure in _SUMMED]
        cost, seeds = row["cost"], ", ".join(map(str, row["seeds"])) or "-"
        token = f"{cost['seconds_per_token']:.2f}x" if cost.get("seconds_per_token") else "-"
        kept = ", ".join(map(str, cost.get("kept_steps", ()))) or "-"
        costs = [f"{cost['steps']:.0f}", kept, f"{cost['train_seconds']:.0f}", token] if cost else ["-", "-", "-", "1x"]
        passes = cost["passes_per_token"] if cost else 1.0
        costs.append("-" if passes is None else f"{passes:.2f}")
        summed.append([label, *rates, "-" if row["apart"] is None else f"{100 * row['apart']:.1f} %", *costs, seeds])
    listed = [name for name in measures if name not in (MEAN_OVER_ATTACKS, *_SUMMED[2:])]
    by_attack = [["", *labels]]
    by_attack += [[name, *(rate_text(rows[label]["rates"].get(name)) for label in labels)] for name in listed]
    changed = [label for label in labels if "against_aligned" in rows[label]]
    against = [["points", *changed]]
    for measure in (MEAN_OVER_ATTACKS, *listed, *_SUMMED[2:]):
        cells = [rows[label]["against_aligned"].get(measure) for label in changed]
        if any(cells):
            against.append([measure, *(difference_text(cell) if cell else "-" for cell in cells)])
    tables = [
        ("rates in % [95 %], over prompts and seeds, and costs", summed),
        ("attack success in % [95 %]", by_attack),
        ("differences from aligned on the same prompts, in points [95 %]", against),
    ]
    if rivals := rows.get(reference, {}).get("against_rivals"):
        ours, best_rivals = rows[reference]["rates"], rows[reference]["best_rival"]
        against_each = [["points", *rivals]]
        against_best = [["", reference, "best rival", "its rate", "difference, points [95 %]"]]
        for measure in ours:
            texts = {label: difference_text(cells[measure]) for label, cells in rivals.items() if measure in cells}
            against_each.append([measure, *(texts.get(label, "-") for label in rivals)])
            if best := best_rivals.get(measure):
                theirs = rows[best]["rates"][measure]
                against_best.append([measure, rate_text(ours[measure]), best, rate_text(theirs), texts[best]])
        limit = f"at most {100 * SPARE_OVER_REFUSAL:g} points more borderline prompts than {reference}"
        alone = "" if best_rivals else f"; none that was asked the same refuses {limit}"
        tables.append((f"{reference} less each rival on the same prompts, in points [95 %]{alone}", against_each))
        if best_rivals:
            among = f", of those that refuse {limit}" if OVER_REFUSAL in ours else ""
            tables.append((f"{reference} against each attack's best rival{among}", against_best))
    return tables


def _notes(found: Mapping[str, Any]) -> list[str]:
    """Sentences on everything that departs from standard settings."""
    notes = [f"{name}: {reason}." for name, reason in found["reduced"]]
    notes += [f"{label}: {'; '.join(row['departures'])}." for label, row in found["rows"].items() if row["departures"]]
    return notes


def _figures(model: str, found: Mapping[str, Any]) -> list[tuple[str, str, Plot | None]]:
    rows = found["rows"]
    return [
        ("Robustness against over-refusal", "Nothing was measured on borderline prompts.", _pareto(model, rows)),
        ("Depth curves side by side", "No prefill was measured.", _depth_curves(model, rows)),
        ("Cost", "No method was trained.", _costs(model, rows)),
    ]


def _looks(rows: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row, the same in every figure."""
    return dict(zip(rows, zip(cycle(_COLORS), cycle(_MARKERS), strict=False), strict=False))


def _pareto(model: str, rows: Mapping[str, Any]) -> Plot | None:
    """Attack success against over-refusal, with intervals; the methods that no other beats in both are joined."""
    known = {
        label: (row["rates"][OVER_REFUSAL], row["rates"][MEAN_OVER_ATTACKS])
        for label, row in rows.items()
        if {OVER_REFUSAL, MEAN_OVER_ATTACKS} <= row["rates"].keys()
    }
    if not known:
        return None
    figure, axes = new_figure(4.0 + 0.07 * len(known))  # the legend takes a row for two or three
    looks = _looks(rows)
    data: list[list[Any]] = [["method", "over_refusal", "low", "high", "asr", "low", "high", "undominated"]]
    best = [
        label
        for label, (refused, success) in known.items()
        if not any(
            other[0]["rate"] <= refused["rate"]
            and other[1]["rate"] <= success["rate"]
            and (other[0]["rate"], other[1]["rate"]) != (refused["rate"], success["rate"])
            for other in known.values()
        )
    ]
    front = sorted((known[label][0]["rate"], -known[label][1]["rate"]) for label in best)
    axes.plot([x for x, _ in front], [-y for _, y in front], color="#999999", linestyle="--", linewidth=1.2, zorder=1)
    for label, (refused, success) in known.items():
        color, marker = looks[label]
        ends = [[[rate["rate"] - rate["low"]], [rate["high"] - rate["rate"]]] for rate in (refused, success)]
        look = {"color": color, "marker": marker, "linestyle": "none", "elinewidth": 0.8, "label": label}
        axes.errorbar([refused["rate"]], [success["rate"]], xerr=ends[0], yerr=ends[1], **look)
        numbers = [rate[key] for rate in (refused, success) for key in ("rate", "low", "high")]
        data.append([label, *numbers, label in best])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("over-refusal of borderline prompts")
    axes.set_ylabel("attack success, mean over attacks")
    axes.set_ylim(-0.02, 1.02)
    legend_above(figure, axes, columns=4)
    caption = (
        "Attack success, mean over attacks, against over-refusal: towards the lower left is better. The dashed line "
        "joins what nothing beats in both. Whiskers are 95 % intervals over prompts and seeds."
    )
    return Plot(f"{model}-pareto", caption, figure, data)


def _depth_curves(model: str, rows: Mapping[str, Any]) -> Plot | None:
    """A panel for each method: attack success by prefill depth, with aligned's curve behind it."""
    depths = depths_of(rows[FROZEN]["rates"])
    labels = [label for label in rows if label not in ("base", FROZEN)]
    if not depths or not labels:
        return None
    count = -(-len(labels) // _PANELS)
    figure, panels = new_figure(1.0 + 1.5 * count, count, _PANELS, sharex=True, sharey=True, squeeze=False)
    places, looks = range(len(depths)), _looks(rows)
    data: list[list[Any]] = [["method", "depth", "asr", "low", "high", "n"]]

    def rates_of(label: str) -> list[Mapping[str, Any]]:
        found = [rows[label]["rates"][name] for name in depths.values()]
        for depth, rate in zip(depths, found, strict=True):
            data.append([label, depth, *(rate[key] for key in ("rate", "low", "high", "n"))])
        return found

    aligned = [rate["rate"] for rate in rates_of(FROZEN)]
    for axes, label in zip(panels.flat, labels, strict=False):
        rates, color = rates_of(label), looks[label][0]
        axes.plot(places, aligned, color="#999999", linestyle="--", linewidth=1.2, label=FROZEN)
        low, high = ([rate[key] for rate in rates] for key in ("low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.16, lw=0)
        axes.plot(places, [rate["rate"] for rate in rates], color=color, marker=".", clip_on=False)
        axes.set_title(fill(label, 18), fontsize=9)
        axes.set_xticks(places, [str(depth) for depth in depths], fontsize=7)
    for axes in panels.flat[len(labels) :]:
        axes.axis("off")
    panels[0][0].set_ylim(0, 1)
    panels[0][0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supxlabel("prefill depth in tokens (not to scale)")
    figure.supylabel("attack success rate")
    caption = (
        "Attack success by depth of the prefill; aligned's is dashed. Bands are 95 % intervals over prompts and seeds. "
        "Lower is safer."
    )
    return Plot(f"{model}-depths", caption, figure, data)


def _costs(model: str, rows: Mapping[str, Any]) -> Plot | None:
    """Seconds of training, and the time of a token in use against aligned's."""
    known = {label: row["cost"] for label, row in rows.items() if row["cost"]}
    if not known:
        return None
    figure, (left, right) = new_figure(1.2 + 0.28 * len(known), 1, 2, sharey=True)
    labels, looks = list(known), _looks(rows)
    colors = [looks[label][0] for label in labels]
    left.barh(labels, [known[label]["train_seconds"] for label in labels], color=colors)
    right.barh(labels, [known[label]["seconds_per_token"] or 0.0 for label in labels], color=colors)
    if not any(cost["seconds_per_token"] for cost in known.values()):
        right.axis("off")
    left.invert_yaxis()
    left.set_xlabel("training steps,\nseconds")
    right.set_xlabel("time of a token,\ntimes aligned's")
    for axes in (left, right):
        axes.grid(False, axis="y")
    data = [["method", "steps", "train_seconds", "train_tokens", "time_of_a_token", "passes_per_token"]]
    keys = ("steps", "train_seconds", "train_tokens", "seconds_per_token", "passes_per_token")
    data += [[label, *(cost[key] for key in keys)] for label, cost in known.items()]
    caption = (
        "Left: seconds of all training steps of one run, waiting for teachers and rollouts included, on the devices of "
        "the run. Right: measured time of a token in answers to harmless prompts, against aligned's, where runs were "
        "alone on the machine and vLLM wrote the answers."
    )
    return Plot(f"{model}-cost", caption, figure, data)


def _markdown(name: str, parts: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    lines = [f"# {name}", ""]
    if missing:
        lines += [f"Not finished: {'; '.join(missing)}.", ""]
    for part in parts:
        lines += [f"## {part['model']}", "", f"Judge: {part['judge']}.", ""]
        for title, rows in part["tables"]:
            lines += [f"**{title}**", "", f"| {' | '.join(rows[0])} |", f"|---|{'---:|' * (len(rows[0]) - 1)}"]
            lines += [*(f"| {' | '.join(row)} |" for row in rows[1:]), ""]
        for figure in part["figures"]:
            if not figure["missing"]:
                lines += [f"![{figure['caption']}]({figure['data'].removesuffix('csv')}png)", ""]
        lines += ["Departures from standard settings:", "", *(f"- {note}" for note in part["notes"]), ""]
    return "\n".join(lines)
