"""The report: one HTML file that needs no other, and the figures with their data beside it.

<run>/report.html           pictures, tables and settings, all inside
<run>/figures/<name>.png    each figure
<run>/figures/<name>.csv    and its data
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context

from raycomplete.evaluation.summary import difference_table
from raycomplete.report import plots
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.runtime.files import PRIVATE, write_bytes
from raycomplete.runtime.types import MODEL_ROLES

MAX_TABLE_ROWS = 60  # longer data stays in its CSV file

_Figure = tuple[str, str, plots.Plot | None]  # heading, what to say where there is no figure, and the figure
_SIGNS = str.maketrans(
    {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
)


def write_report(run_folder: Path) -> Path:
    """Writes report.html and figures/ from what is in a run folder."""
    run = read_run_folder(run_folder)
    with rc_context(plots.STYLE):
        sections = [section(run_folder, *figure) for figure in _figures(run)]
    text = render(
        "template.html.j2",
        name=str(run.summary.get("name") or run_folder.resolve().name),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        reduced=run.reduced,
        headline=_headline(run),
        table=_table(run.summary),
        differences=difference_table(run.summary.get("comparisons") or []),
        tokens=plots.token_tables(run.diagnosis) if run.diagnosis else [],
        judge=run.summary.get("judge") or next((result["judge"] for result in run.results.values()), None),
        measured=_measured(run),
        safety_regressions=run.summary.get("safety_regressions") or [],
        sections=sections,
        measures=_measures(run),
        train=run.summary.get("train"),
        versions=run.summary.get("versions"),
        settings=next((result["settings"] for result in run.results.values() if result.get("settings")), None),
        short_answers=_short_answers(run),
        models={role: str(result.get("model_id", "")) for role, result in run.results.items()},
        diagnosis=_diagnosis_settings(run.diagnosis),
        config=run.config,
    )
    path = run_folder / "report.html"
    shown = run.diagnosis is not None and run.diagnosis["settings"]["show_harmful"]
    write_bytes(path, text.encode("utf-8", errors="replace"), mode=PRIVATE if shown else 0o644)
    if run.diagnosis is not None:
        rows = _csv(plots.token_rows(run.diagnosis))
        write_bytes(run_folder / "figures" / "base_favored_tokens.csv", rows, mode=PRIVATE if shown else 0o644)
    return path


def render(template: str, **values: Any) -> str:
    """Fills in a page of this package."""
    environment = Environment(
        loader=PackageLoader(str(__package__), "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "visible": visible, "setting": setting}
    return environment.get_template(template).render(**values)


def percent(rate: float) -> str:
    """Writes a rate as `"12.3 %"`, without a sign on zero."""
    return f"{100 * rate + 0.0:.1f}\N{NO-BREAK SPACE}%"


def visible(token: str) -> str:
    """Writes a token so that it can be read in a table: white space has a sign."""
    return token.translate(_SIGNS) or "(special)"


def setting(value: Any) -> str:
    """Writes a value of a run file in words: lists by commas, sections by their keys, what is not set left out."""
    if isinstance(value, Mapping):
        given = {key: found for key, found in value.items() if found not in (None, [], {})}
        return "; ".join(f"{key} {setting(found)}" for key, found in given.items()) or "-"
    if isinstance(value, list | tuple):
        mappings = any(isinstance(item, Mapping) for item in value)
        return (" | " if mappings else ", ").join(map(setting, value)) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(run: RunFolder) -> list[_Figure]:
    """Every figure of the page in order; of a diagnosis alone, nothing of a run is missing."""
    summary, metrics, found, figures = run.summary, run.metrics, run.diagnosis, list[_Figure]()
    no_rates = "No model of this run has been evaluated."
    no_results = "Neither evaluation/aligned.json nor evaluation/student.json is in this run."
    no_metrics = "This run has no metrics.jsonl: it was evaluated without training."
    if run.results or summary["asr"] or metrics or run.profile or found is None:
        no_attacks = "No attack but the depth curve is recorded in this run."
        no_profile = "This run has no profile.json: raycomplete diagnose needs no training for one."
        no_steering, no_depths, no_rollouts = no_metrics, no_metrics, no_metrics
        if metrics:
            no_steering = "No training prompts were held back in this run."
            no_depths = "No step of this run recorded its depth sampler."
            no_rollouts = "The student did not roll out in this run."
        figures += [
            ("Safety and utility at a glance", no_rates, plots.rate_bars(summary)),
            ("Attack by attack", no_attacks, plots.attack_bars(summary["attacks"])),
            ("Attack success by prefill depth", no_rates, plots.prefill_curve(summary)),
            ("What the models did", no_results, plots.outcome_bars(run.results)),
            ("Where training changed the model", no_profile, plots.position_profile(run.profile or {})),
            ("Training", no_metrics, plots.training_curves(metrics, run.terms)),
            ("How training steered itself", no_steering, plots.steering(metrics)),
            ("Depths that were trained", no_depths, plots.depth_heat_map(metrics)),
            ("Where the student still complied", no_rollouts, plots.compliance_heat_map(metrics)),
        ]
    if found is not None:
        no_gradient = "Not measured: diagnose.gradient is off, or the aligned model refuses none of the prompts."
        figures += [
            ("Where alignment stopped", "", plots.where_it_stopped(found)),
            ("What the model would say there", "", plots.what_it_does(found)),
            ("Harmful prompts against harmless ones", "No benign prompt was measured.", plots.control(found)),
            ("How much each position teaches", no_gradient, plots.gradient_curve(found.get("gradient"))),
        ]
    return figures


def section(folder: Path, title: str, missing: str, plot: plots.Plot | None) -> dict[str, Any]:
    """Writes figures/<name>.png and .csv of a figure; returns its picture, and its data unless too long, for a page."""
    if plot is None:
        return {"title": title, "missing": missing}
    picture = io.BytesIO()
    plot.figure.savefig(picture, format="png", metadata={"Software": "raycomplete"})
    data = f"figures/{plot.name}.csv"
    write_bytes(folder / "figures" / f"{plot.name}.png", picture.getvalue())
    write_bytes(folder / data, _csv(plot.rows))
    return {
        "title": title,
        "missing": "",
        "caption": plot.caption,
        "image": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii"),
        "data": data,
        "rows": [list(map(_cell, row)) for row in plot.rows] if len(plot.rows) <= MAX_TABLE_ROWS else [],
    }


def _measures(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Terms of the loss and what they measure: name, description, value at the first step and at the last one."""
    found = []
    for term, told in run.terms.items():
        for name, description in {term: told.get("description", ""), **told.get("metrics", {})}.items():
            values = [row[name] for row in run.metrics if row.get(name) is not None]
            if values:
                found.append((name, description, _cell(values[0]), _cell(values[-1])))
    return found


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(
        [f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows
    )
    return table.getvalue().encode("utf-8", errors="backslashreplace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headline(run: RunFolder) -> list[dict[str, str]]:
    """The numbers to remember: where alignment stopped, how much safer, how useful, how over-cautious."""
    summary = run.summary
    cards = [_depth_card(run.diagnosis)] if run.diagnosis is not None else []
    if summary["asr"]:
        note, reduction = "", summary.get("asr_reduction")
        if reduction is not None:
            note = f"{percent(abs(reduction))} {'more' if reduction < 0 else 'fewer'} than aligned"
            if found := summary.get("asr_reduction_interval"):
                note += f" (reduced by {percent(found['low'])} to {percent(found['high'])})"
        means = {role: entry["mean"] for role, entry in summary["asr"].items()}
        cards.append({"label": "Attack success, mean over depths", **_before_after(means), "note": note})
    for key, label in {"utility": "Utility on benign", "over_refusal": "Over-refusal of borderline"}.items():
        rates = summary.get(key) or {role: result[key] for role, result in run.results.items()}
        if rates:
            cards.append({"label": f"{label} prompts", **_before_after(rates), "note": ""})
    return cards


def _depth_card(diagnosis: Mapping[str, Any]) -> dict[str, str]:
    """Completion depth of the student, or of aligned where there is no student."""
    found = diagnosis["kinds"]["harmful"]
    depths = found["completion_depth"]
    role, depth = list(depths.items())[-1]
    value, _, interval = plots.depth_words(depth).partition(" (")
    even, odd = ("beyond" if half is None else str(half) for half in depth["halves"])
    return {
        "label": "Completion depth in tokens: first position at which the rising fit of the mean deficit exceeds "
        f"{depth['threshold']:g}",
        "value": value if depth["depth"] is not None else f"> {depth['num_positions'] - 1}",
        "role": role,
        "interval": interval.rstrip(")") + (", " if interval else "") + f"n = {found['measured']}",
        "before": f"aligned {plots.depth_words(depths['aligned'])}" if role != "aligned" else "",
        "note": f"halves of the prompts: {even} and {odd}",
    }


def _diagnosis_settings(diagnosis: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings and counts of a diagnosis as plain text."""
    if diagnosis is None:
        return {}
    hidden = {"harmful", "benign", "contrastive", "student"}  # one of them of earlier versions
    shown = {key: value for key, value in diagnosis["settings"].items() if key not in hidden}
    counts = {
        f"{kind} prompts": f"{found['measured']} measured of {found['prompts']}, {found['tokens']} response tokens"
        for kind, found in diagnosis["kinds"].items()
    }
    return counts | {"intervals": diagnosis["intervals"]} | {f"diagnose.{key}": value for key, value in shown.items()}


def _before_after(rates: Mapping[str, Any]) -> dict[str, str]:
    """Aligned and student where both are there, else what there is."""
    role = "student" if "student" in rates else next(iter(rates))
    rate = rates[role]
    before = f"aligned {percent(rates['aligned']['rate'])}" if role == "student" and "aligned" in rates else ""
    return {
        "role": role,
        "value": percent(rate["rate"]) if rate["n"] else "not measured",
        "interval": f"{percent(rate['low'])} to {percent(rate['high'])}, n = {rate['n']}" if rate["n"] else "",
        "before": before,
    }


def _table(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Depth by model, then the other rates and benchmarks; each cell holds rate, interval and n."""
    roles = [role for role in MODEL_ROLES if role in summary["asr"]]
    if not roles:
        return None
    rows = [
        (f"Attack success, depth {depth}", [summary["asr"][role]["by_depth"].get(depth) for role in roles])
        for depth in plots.depths_of(summary)
    ]
    rows.append(("Attack success, mean", [summary["asr"][role]["mean"] for role in roles]))
    others = {"utility": "Utility", "over_refusal": "Over-refusal (borderline)", "benign_refusal": "Refusal (benign)"}
    for key, label in others.items():
        if rates := summary.get(key):
            rows.append((label, [rates.get(role) for role in roles]))
        if key == "over_refusal" and len(sources := summary.get("over_refusal_by_source") or {}) > 1:
            rows += [(f"Over-refusal, {name}", [found.get(role) for role in roles]) for name, found in sources.items()]
    if nll := summary.get("benign_nll"):
        rows.append(("Benign answers, negative log-likelihood in nats a token", [nll.get(role) for role in roles]))
    for name, by_role in (summary.get("capabilities") or {}).items():
        for key in ("accuracy", "refused"):
            rows.append((f"{name.upper()}, {key}", [by_role[role][key] if role in by_role else None for role in roles]))
    return {"roles": roles, "rows": rows}


def _measured(run: RunFolder) -> Mapping[str, Any] | None:
    """The judge's own error rates: against people, and on the traps."""
    found = [run.summary.get("judge_measured"), *(result.get("judge_measured") for result in run.results.values())]
    measured = next(filter(None, found), None)
    return measured if isinstance(measured, Mapping) else None


def _short_answers(run: RunFolder) -> list[tuple[str, int, int]]:
    """(depth, prompts with an answer shorter than it, prompts in all), where there are any."""
    for result in run.results.values():
        short = [variant for variant in result.get("variants", {}).values() if variant.get("short_answers")]
        return [
            (str(variant["depth"]), int(variant["short_answers"]), int(variant["n"] + variant["short_answers"]))
            for variant in short
        ]
    return []
