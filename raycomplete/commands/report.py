"""`raycomplete report`: the page of one run, or the rates of several runs that differ in their seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as RichConsole

from raycomplete.report.html import write_report
from raycomplete.report.runs import aggregate_runs, run_tables, write_aggregate
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError


def report(folders: Sequence[Path], *, output: Path | None = None, allow_differences: bool = False) -> Path:
    """Writes report.html of one run folder, or prints and writes the rates of several as `aggregate_runs` finds them.

    Returns:
        The file that was written.

    Raises:
        ConfigError: The runs differ in more than the seed, or an option was given that one run has no use for.
        DataError: A run folder lacks something.
    """
    if len(folders) == 1:
        if output is not None or allow_differences:
            raise ConfigError("--output and --allow-differences are for several runs.", "Name more run folders.")
        path = write_report(folders[0])
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
