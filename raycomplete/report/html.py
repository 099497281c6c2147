"""The report: one HTML file that needs no other, and the figures with their data beside it.

<run>/report.html           pictures, tables and settings, all inside
<run>/figures/<name>.png    each figure
<run>/figures/<name>.csv    and its data
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from raycomplete.files import write_bytes
from raycomplete.report import plots
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.report.style import house_style
from raycomplete.types import MODEL_ROLES

MAX_TABLE_ROWS = 60  # longer data stays in its CSV file


@dataclass(frozen=True)
class Section:
    """One figure of the page, or the reason why it is missing.

    Attributes:
        title: Heading.
        missing: Why there is no figure; empty where there is one.
        caption: What is seen.
        image: The PNG as a data URI.
        csv_name: The data file, relative to the run folder.
        rows: The data as text, header row first; empty where it is too long for a page.
    """

    title: str
    missing: str = ""
    caption: str = ""
    image: str = ""
    csv_name: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def write_report(run_folder: Path) -> Path:
    """Writes report.html and figures/ from what is in a run folder.

    Args:
        run_folder: Needs summary.json; a part whose file is missing is replaced by a sentence that says so.

    Returns:
        The path of report.html.

    Raises:
        DataError: summary.json is missing, or a file is malformed.
    """
    run = read_run_folder(run_folder)
    with house_style():
        sections = [
            _section(run_folder, title, missing, make if present else None)
            for title, missing, present, make in _figures(run)
        ]
    page = _environment().from_string(files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8"))
    text = page.render(
        name=str(run.summary.get("name") or run_folder.resolve().name),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        reduced=run.reduced,
        headline=_headline(run),
        table=_table(run.summary),
        judge=run.summary.get("judge") or next((result["judge"] for result in run.results.values()), None),
        measured=_measured(run),
        sections=sections,
        train=run.summary.get("train"),
        versions=run.summary.get("versions"),
        settings=next((result["settings"] for result in run.results.values() if result.get("settings")), None),
        short_answers=_short_answers(run),
        models={role: str(result.get("model_id", "")) for role, result in run.results.items()},
        config=run.config,
    )
    path = run_folder / "report.html"
    write_bytes(path, text.encode("utf-8", errors="replace"))
    return path


def percent(rate: float) -> str:
    """`"12.3 %"`, without a sign on zero."""
    return f"{100 * rate + 0.0:.1f}\N{NO-BREAK SPACE}%"


def _figures(run: RunFolder) -> list[tuple[str, str, bool, Callable[[], plots.Plot | None]]]:
    """Title, what to say where it is missing, whether its data is there, and how it is drawn."""
    no_metrics = "This run has no metrics.jsonl: it was evaluated without training."
    profile = run.profile or {}
    return [
        (
            "Attack success by prefill depth",
            "No model of this run has been evaluated.",
            bool(run.summary["asr"]),
            lambda: plots.prefill_curve(run.summary),
        ),
        (
            "What the models did",
            "Neither evaluation/aligned.json nor evaluation/student.json is in this run.",
            bool(run.results),
            lambda: plots.outcome_bars(run.results),
        ),
        (
            "Where training changed the model",
            "This run has no profile.json: raycomplete diagnose writes it.",
            bool(profile.get("positions")),
            lambda: plots.position_profile(profile),
        ),
        ("Training", no_metrics, bool(run.metrics), lambda: plots.training_curves(run.metrics)),
        (
            "Depths that were trained",
            "No step of this run recorded its depth sampler." if run.metrics else no_metrics,
            bool(run.metrics),
            lambda: plots.depth_heat_map(run.metrics),
        ),
    ]


def _section(run_folder: Path, title: str, missing: str, make: Callable[[], plots.Plot | None] | None) -> Section:
    """Draws a figure, writes its files and prepares it for the page."""
    plot = make() if make else None
    if plot is None:
        return Section(title=title, missing=missing)
    picture, table = io.BytesIO(), io.StringIO(newline="")
    plot.figure.savefig(picture, format="png", metadata={"Software": "raycomplete"})
    csv.writer(table, lineterminator="\n").writerows(
        [f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in plot.rows
    )
    write_bytes(run_folder / "figures" / f"{plot.name}.png", picture.getvalue())
    write_bytes(run_folder / "figures" / f"{plot.name}.csv", table.getvalue().encode("utf-8"))
    shown = plot.rows if len(plot.rows) <= MAX_TABLE_ROWS else []
    return Section(
        title=plot.title,
        caption=plot.caption,
        image="data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii"),
        csv_name=f"figures/{plot.name}.csv",
        rows=tuple(tuple(_cell(value) for value in row) for row in shown),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headline(run: RunFolder) -> list[dict[str, str]]:
    """Three numbers: how much safer, how useful, how over-cautious."""
    summary = run.summary
    cards = []
    if summary["asr"]:
        reduction = summary.get("asr_reduction")
        note = f"{percent(reduction)} fewer than aligned" if reduction is not None else ""
        if reduction is not None and reduction < 0:
            note = f"{percent(-reduction)} more than aligned"
        means = {role: entry["mean"] for role, entry in summary["asr"].items()}
        cards.append({"label": "Attack success, mean over depths", **_before_after(means), "note": note})
    for label, key in (
        ("Utility on benign prompts", "utility"),
        ("Over-refusal of borderline prompts", "over_refusal"),
    ):
        rates = summary.get(key) or {role: result[key] for role, result in run.results.items()}
        if rates:
            cards.append({"label": label, **_before_after(rates), "note": ""})
    return cards


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
    """Depth by model, then the other rates; each cell holds rate, interval and n."""
    roles = [role for role in MODEL_ROLES if role in summary["asr"]]
    if not roles:
        return None
    rows = [
        (f"Attack success, depth {depth}", [summary["asr"][role]["by_depth"].get(depth) for role in roles])
        for depth in plots.depths_of(summary)
    ]
    rows.append(("Attack success, mean", [summary["asr"][role]["mean"] for role in roles]))
    for label, key in (
        ("Utility", "utility"),
        ("Over-refusal (borderline)", "over_refusal"),
        ("Refusal (benign)", "benign_refusal"),
    ):
        rates = summary.get(key) or {}
        if rates:
            rows.append((label, [rates.get(role) for role in roles]))
    return {"roles": roles, "rows": rows}


def _measured(run: RunFolder) -> Mapping[str, Any] | None:
    """The judge's own error rates."""
    measured = run.summary.get("judge_measured")
    for result in run.results.values():
        measured = measured or result.get("judge_measured")
    return measured if isinstance(measured, Mapping) and "sensitivity" in measured else None


def _short_answers(run: RunFolder) -> list[tuple[str, int, int]]:
    """(depth, prompts with an answer shorter than it, prompts), where there are any."""
    for result in run.results.values():
        cells = [cell for cell in result["cells"].values() if cell.get("short_answers")]
        return [(str(cell["depth"]), int(cell["short_answers"]), int(cell["n"])) for cell in cells]
    return []


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    return environment
