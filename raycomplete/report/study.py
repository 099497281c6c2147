"""A study: rates of every method over its seeds, differences from aligned and from rivals, costs, pages and figures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import PercentFormatter

from raycomplete.config.defences import ContrastiveDefence, SafeDecodingDefence
from raycomplete.config.study import BASE, FROZEN, Study, StudyRun
from raycomplete.evaluation.statistics import difference_over_runs, mean_over_runs
from raycomplete.evaluation.summary import OTHER_RATES, difference_text, rate_text, reasons_by_role, reductions
from raycomplete.report.html import render, section
from raycomplete.report.plots import STYLE, Plot, legend_above, new_figure
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.report.runs import Shares, shares_by_measure
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import write_json, write_text

MEAN_OVER_ATTACKS = "ASR, mean over attacks"
OVER_REFUSAL = "over-refusal"
SPARE_OVER_REFUSAL = 0.02  # by which a rival may refuse more harmless prompts than the reference and still be compared
_STUDENT = "student"
_NOT_ATTACKS = tuple(label.removesuffix(" (borderline)") for label in OTHER_RATES.values())
_CUT = re.compile(r" \(\d+ of \d+ cut\)$")  # of answers; the counts differ between seeds
_APART = ("off_topic", "incoherent")  # outcomes that are neither the attack's nor the model's success

Row = dict[str, Any]
Table = tuple[str, list[list[str]]]
_PREFILL = "ASR, mean over depths"
_SUMMED = (MEAN_OVER_ATTACKS, _PREFILL, OVER_REFUSAL, "refusal (benign)", "utility")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "oDs^vP*X<>hd"
_PANELS = 3  # of a row of depth curves


def study_results(study: Study, finished: Sequence[StudyRun]) -> dict[str, Any]:
    """Computes study.json from the folders of finished runs."""
    models = {}
    for model in dict.fromkeys(run.model for run in study.runs):
        runs = [run for run in finished if run.model == model]
        if any(run.label == FROZEN for run in runs):
            models[model] = _of_model(study, runs)
    return {"name": study.config.output.name, "reference": study.reference, "models": models}


def _of_model(study: Study, runs: Sequence[StudyRun]) -> dict[str, Any]:
    folders = {run.config.output.folder: read_run_folder(run.config.output.folder) for run in runs}
    judges: dict[str, list[str]] = defaultdict(list)
    for path, folder in folders.items():
        judges[str(folder.summary.get("judge"))].append(path.name)
    if len(judges) > 1:
        named = "; ".join(f"{judge}: {', '.join(names)}" for judge, names in sorted(judges.items()))
        raise DataError(
            f"The runs of a study were judged by different judges: {named}.",
            "Delete summary.json of all that today's judge has not judged, and start the study with --resume: stored "
            "answers are judged again, and none is generated twice.",
        )
    by_label: dict[str, list[tuple[StudyRun, RunFolder]]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append((run, folders[run.config.output.folder]))
    ((frozen_run, frozen),) = by_label.pop(FROZEN)
    rows: dict[str, Row] = {}
    shares: dict[str, list[dict[str, Shares]]] = {}
    for role in (BASE, FROZEN):
        if role in frozen.results:
            shares[role] = [_shares(frozen_run.config.output.folder, frozen.results[role])]
            rows[role] = {"seeds": [], "apart": _apart([frozen.results[role]]), "cost": {}, "departures": []}
    is_alone = study.config.parallel == 1  # runs side by side slow each other
    plain = _seconds_per_token([frozen.results[FROZEN]]) if is_alone else None
    for label in (*study.config.methods, *study.config.defences):
        if not (found := by_label.get(label)):
            continue
        results = [folder.results[_STUDENT] for _, folder in found]
        shares[label] = [_shares(run.config.output.folder, folder.results[_STUDENT]) for run, folder in found]
        # Two models are decoded by transformers, whose seconds say nothing beside those of vLLM.
        has_two = isinstance(found[0][0].config.evaluation.defence, ContrastiveDefence | SafeDecodingDefence)
        rows[label] = {
            "seeds": [run.seed for run, _ in found if run.seed is not None],
            "apart": _apart(results),
            "cost": _cost([folder for _, folder in found], results, None if has_two else plain),
            "departures": list(found[0][0].departures),
        }
    try:
        _add_rates(rows, shares)
        _add_rivals(study.reference, rows, shares)
    except ValueError as error:
        raise DataError("Two runs of the study have no prompts in common.", "Evaluate all on the same data.") from error
    return {"rows": rows, "judge": next(iter(judges)), "reduced": _reduced(frozen, by_label)}


def _reduced(frozen: RunFolder, by_label: Mapping[str, Sequence[tuple[StudyRun, RunFolder]]]) -> list[tuple[str, str]]:
    """Pairs each attack with why its rates are less than standard, and with the rows of which it is true if not all."""
    models = [(role, role, frozen.summary) for role in (BASE, FROZEN)]
    models += [(label, _STUDENT, folder.summary) for label, found in by_label.items() for _, folder in found]
    told: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, role, summary in models:
        for name, by_role in reasons_by_role(summary).items():
            if role in by_role:
                reasons = [_CUT.sub(", some cut", reason) for reason in by_role[role]]
                told[name][label] += [reason for reason in reasons if reason not in told[name][label]]
    return reductions({**frozen.summary, "attacks": {}, "reduced_because": told})


def _shares(folder: Path, result: Mapping[str, Any]) -> dict[str, Shares]:
    """Shares of successful trials by measure and prompt; their mean over attacks is of prompts that all have asked."""
    found = shares_by_measure(str(folder), result, in_detail=False)
    attacks = [
        shares for measure, (shares, _) in found.items() if measure not in _NOT_ATTACKS and not _is_depth(measure)
    ]
    common = set.intersection(*(set(attack) for attack in attacks))
    mean = {prompt: sum(attack[prompt] for attack in attacks) / len(attacks) for prompt in common}
    return ({MEAN_OVER_ATTACKS: (mean, 1)} if mean else {}) | found


def _is_depth(measure: str) -> bool:
    return measure.startswith("ASR, depth ")


def depths_of(rates: Mapping[str, Any]) -> dict[int, str]:
    """Maps prefill depths to their measures, in order."""
    return {int(name.rpartition(" ")[2]): name for name in rates if _is_depth(name)}


def _add_rates(rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]]) -> None:
    for label, row in rows.items():
        row["rates"] = {
            measure: mean_over_runs([run[measure][0] for run in shares[label]], trials)
            for measure, (_, trials) in shares[label][0].items()
            if all(measure in run for run in shares[label])
        }
        if label not in (BASE, FROZEN):
            row["against_aligned"] = {
                measure: _difference(rows, shares, (label, FROZEN), measure)
                for measure in row["rates"]
                if measure in shares[FROZEN][0]
            }


def _difference(
    rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]], labels: tuple[str, str], measure: str
) -> dict[str, Any]:
    """Compares two rows on the seeds that both have; a row without seeds is the same under each of the other's."""
    seeds = _common_seeds(*(rows[label]["seeds"] for label in labels)) or [0]
    ours, theirs = (
        [shares[label][known.index(seed) if known else 0][measure][0] for seed in seeds]
        for label, known in ((label, rows[label]["seeds"]) for label in labels)
    )
    return difference_over_runs(ours, theirs)


def _common_seeds(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    return [seed for seed in ours or theirs if seed in (theirs or ours)]


def _add_rivals(reference: str, rows: Mapping[str, Row], shares: Mapping[str, list[dict[str, Shares]]]) -> None:
    """Compares the reference with all rivals; each attack's best is one of those that refuse as little as it does."""
    if reference not in rows:
        return
    rates = rows[reference]["rates"]
    # Of a rival whose runs under the reference's seeds are not finished, nothing can be said yet.
    rows[reference]["against_rivals"] = found = {
        label: {name: _difference(rows, shares, (reference, label), name) for name in rates if name in row["rates"]}
        for label, row in rows.items()
        if label not in (reference, BASE, FROZEN) and _common_seeds(rows[reference]["seeds"], row["seeds"])
    }
    allowed = rates[OVER_REFUSAL]["rate"] + SPARE_OVER_REFUSAL + 1e-9 if OVER_REFUSAL in rates else 1.0  # .12 + .02
    rivals = {
        label: rows[label]["rates"]
        for label in found
        if rows[label]["rates"].get(OVER_REFUSAL, {"rate": 0.0})["rate"] <= allowed
    }
    rows[reference]["best_rival"] = {
        measure: min(having, key=lambda label: rivals[label][measure]["rate"])
        for measure in rates
        if measure not in _NOT_ATTACKS and (having := [label for label in rivals if measure in rivals[label]])
    }


def _apart(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the answers to prefills that are off topic or babble: no success of the attack, and none of a model."""
    blocks = [result["attacks"]["prefill"] for result in results if "prefill" in result.get("attacks", {})]
    trials = sum(block["trials"] for block in blocks)
    return sum(block["outcomes"].get(name, 0) for block in blocks for name in _APART) / trials if trials else None


def _cost(folders: Sequence[RunFolder], results: Sequence[Mapping[str, Any]], plain: float | None) -> Row:
    """Steps that runs kept, and means over them, the time of a token against aligned's only where that is known."""
    trained = [folder.summary["train"] for folder in folders if folder.summary.get("train")]
    spoken = _seconds_per_token(results)
    counted = [result["defence"]["passes_per_token"] for result in results if result.get("defence")]
    passes = [count for count in counted if count is not None]  # answers that were all found again took none
    return {
        "kept_steps": [(run.get("kept_step") or {"step": run["steps"]})["step"] for run in trained],
        "train_seconds": sum(run["seconds"] for run in trained) / len(trained) if trained else 0.0,
        "train_tokens": sum(run["tokens"] for run in trained) / len(trained) if trained else 0.0,
        "steps": sum(run["steps"] for run in trained) / len(trained) if trained else 0.0,
        "seconds_per_token": spoken / plain if spoken is not None and plain else None,
        "passes_per_token": sum(passes) / len(passes) if passes else None if counted else 1.0,
    }


def _seconds_per_token(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the evaluation per token that was said to harmless prompts."""
    variants = [result["variants"][kind] for result in results for kind in ("benign", "borderline")]
    tokens = sum(variant.get("tokens", 0) for variant in variants)
    return sum(variant["seconds"] for variant in variants) / tokens if tokens else None


def write_study(study: Study, finished: Sequence[StudyRun]) -> list[Table]:
    """Writes study.json, study.md, study.html and figures/ of a study from its finished runs."""
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
