"""`raycomplete report`: the page of one run or its rates for other tools, or the rates of several runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as RichConsole

from raycomplete.report.html import write_report
from raycomplete.report.model_card import write_model_card
from raycomplete.report.run_folder import COLUMNS, rate_rows, read_run_folder
from raycomplete.report.runs import aggregate_runs, run_tables, write_aggregate
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json, write_text

FORMATS = ("html", "csv", "json", "inspect")


def report(
    folders: Sequence[Path],
    *,
    kind: str = "html",
    output: Path | None = None,
    allow_differences: bool = False,
    show_harmful: bool = False,
) -> Path:
    """Writes the report of one run as `kind` says, or prints and writes the rates of several; returns its path."""
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind} is unknown.", f"Choose one of {', '.join(FORMATS)}.")
    if show_harmful and kind != "inspect":
        raise ConfigError("--show-harmful is for --format inspect.", "Leave it out.")
    if len(folders) > 1 and kind != "html":
        raise ConfigError(f"--format {kind} is for one run.", "Name one run folder.")
    if len(folders) == 1:
        if allow_differences or (output is not None and kind == "html"):
            words = "--output and --allow-differences are for several runs."
            raise ConfigError(words, "Name more run folders, or another --format.")
        path = _of_one_run(folders[0], kind, output, show_harmful)
    else:
        aggregate = aggregate_runs(folders, allow_differences=allow_differences)
        path = write_aggregate(aggregate, output)
        console = Console()
        for difference in aggregate["differences"]:
            console.note(f"The runs differ: {difference}.")
        for title, rows in run_tables(aggregate):
            console.table(title, rows)
    RichConsole().print(f"{path}", highlight=False, soft_wrap=True)
    return path


def _of_one_run(folder: Path, kind: str, output: Path | None, show_harmful: bool) -> Path:
    if kind == "html":
        path = write_report(folder)
        write_model_card(folder)
        return path
    if kind == "inspect":
        from raycomplete.report.inspect_log import write_inspect_logs  # loads torch

        return write_inspect_logs(folder, output, show_harmful=show_harmful)[0].parent
    rows, path = rate_rows(read_run_folder(folder)), output or folder / f"rates.{kind}"
    if kind == "json":
        write_json(path, rows)
        return path
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())
    return path
