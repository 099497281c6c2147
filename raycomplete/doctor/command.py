"""The command: runs the checks and shows them as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raycomplete import __version__
from raycomplete.config import load_run_file
from raycomplete.doctor.findings import Context, Status, worst
from raycomplete.doctor.runner import CHECKS, Outcome, run_checks
from raycomplete.runtime.errors import RaycompleteError

SCHEMA = 1  # of the JSON; raised when a key is renamed or goes
_MARKS: dict[Status, str] = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(run_file: Path | None, overrides: Sequence[str], *, as_json: bool, quick: bool) -> int:
    """Examines this machine, and the cluster where one is named, for a run file or for the demo.

    Args:
        run_file: What the machine is examined for; None assumes the needs of the demo.
        overrides: Values that replace those of the run file.
        as_json: One JSON object on standard output and nothing else.
        quick: Without starting an engine and without importing vLLM.

    Returns:
        0, or 2 where a check failed.
    """
    context = _context(run_file, overrides, quick=quick)
    console = Console(stderr=as_json, quiet=as_json)
    with console.status("") as status:
        outcomes = list(run_checks(context, CHECKS, on_start=lambda name: status.update(f"Checking {name} ...")))
    if as_json:
        print(json.dumps(report(context, outcomes), indent=1))
    else:
        _show(console, outcomes)
    return 2 if _worst(outcomes) == "fail" else 0


def report(context: Context, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "schema": SCHEMA,
        "raycomplete": __version__,
        "status": _worst(outcomes),
        "run_file": str(context.run_file) if context.run_file else None,
        "address": context.address,
        "quick": context.quick,
        "checks": [
            {
                "name": outcome.name,
                "status": outcome.finding.status,
                "found": outcome.finding.found,
                "remedy": outcome.finding.remedy,
                "seconds": round(outcome.seconds, 3),
                "values": outcome.finding.values,
            }
            for outcome in outcomes
        ],
    }


def _context(run_file: Path | None, overrides: Sequence[str], *, quick: bool) -> Context:
    if run_file is None:
        return Context(quick=quick)
    try:
        config = load_run_file(run_file, overrides)
    except RaycompleteError as error:
        return Context(run_file, None, overrides, error, quick=quick)
    return Context(run_file, config, overrides, quick=quick)


def _show(console: Console, outcomes: Sequence[Outcome]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("status", "check", "found"):
        table.add_column(name, no_wrap=name != "found")
    for outcome in outcomes:
        finding = outcome.finding
        words = escape(finding.found)
        if finding.remedy:
            words += f"\n[bold]-> {escape(finding.remedy)}[/bold]"
        table.add_row(_MARKS[finding.status], outcome.name, words)
    console.print(table, highlight=False)
    counts = {status: sum(outcome.finding.status == status for outcome in outcomes) for status in _MARKS}
    seconds = sum(outcome.seconds for outcome in outcomes)
    console.print(
        f"\n{counts['ok']} ok, {counts['warn']} to note, {counts['fail']} failed, in {seconds:.0f} s.", highlight=False
    )


def _worst(outcomes: Sequence[Outcome]) -> Status:
    return worst([outcome.finding.status for outcome in outcomes])
