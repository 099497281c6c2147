"""Measures, prints, and leaves results.json and results.md in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.benchmarks.diagnosis.measure import Found, Work, measure
from tests.benchmarks.environment import describe, environment
from tests.benchmarks.tables import Table

TARGET_SPEED = 0.8  # of the engines' own rate
TARGET_MIB = 4096


def run(work: Work, out: Path, console: Console | None = None) -> Found:
    """One measurement with its table."""
    console = console or Console(width=160)
    stats = environment(torch.device("cpu")) | {"load_before": os.getloadavg()}
    console.print(describe(stats))
    found = measure(work, out / "diagnosis")
    table = _table(work, found)
    table.show(console)
    write_text(
        out / "results.json",
        json.dumps({"environment": stats, "work": asdict(work), "found": asdict(found)}, indent=2) + "\n",
    )
    load = ", ".join(f"{value:.1f}" for value in stats["load_before"])
    write_text(out / "results.md", f"{describe(stats)}; load before: {load}\n\n{table.to_markdown()}")
    console.print(f"Written to {out}")
    return found


def _table(work: Work, found: Found) -> Table:
    def rate(tokens: int, seconds: list[float]) -> str:
        # Processor time is counted in hundredths of a second, so it can be none at all.
        return f"{tokens / sum(seconds):.0f}" if sum(seconds) else "-"

    rows = [
        (
            "scorers alone" if work.engines else "random hidden states alone",
            rate(found.alone_tokens, found.engine.wall_s),
            rate(found.alone_tokens, found.engine.cpu_s),
            "1.00x" if work.engines else "",
            "",
        ),
        (
            "diagnosis" if work.engines else "rows and files",
            rate(found.response_tokens, found.diagnosis.wall_s),
            rate(found.response_tokens, found.diagnosis.cpu_s),
            f"{found.alone_ratio:.2f}x" if work.engines else "",
            f"{found.peak_mib:.0f} MiB, after each partition {min(found.rss_mib):.0f} to {max(found.rss_mib):.0f}",
        ),
    ]
    equal = "equal to the last bit" if found.equal_after_resume else f"within {found.largest_difference:.2g}"
    title = (
        f"Diagnosis, {work.base}, {work.prompts} prompts x {work.answer_tokens} response tokens, partitions of "
        f"{work.partition_prompts}; targets: {TARGET_SPEED}x of the scorers' own rate, {TARGET_MIB} MiB; a partition "
        f"that was thrown away and made again: {equal}"
    )
    columns = ("", "response tokens/s", "by processor time", "of the scorers' rate", "memory of the driver, peak")
    return Table(title, columns, rows)
