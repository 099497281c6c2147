"""`python -m tests.benchmarks.plan`: predicted, measured and their ratio."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.benchmarks.environment import RUNS, describe, environment
from tests.benchmarks.plan.cases import CASES
from tests.benchmarks.plan.cpu import measured_cpu
from tests.benchmarks.plan.measured import measured_points
from tests.benchmarks.plan.points import table
from tests.benchmarks.plan.recorded import recorded_points, trainer_point


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan", description=__doc__)
    parser.add_argument("--recorded", action="store_true", help="only earlier measurements; starts nothing")
    parser.add_argument(
        "--no-engines", action="store_true", help="the optimizer step alone, without vLLM and DeepSpeed"
    )
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the measured models")
    parser.add_argument("--out", type=Path, default=RUNS / "plan", help="folder of results.md")
    arguments = parser.parse_args()
    console = Console(width=150)
    tables = [table("One H100, recorded", recorded_points())]
    if not arguments.recorded:
        chosen = [case for case in CASES if arguments.only in (None, case.name)]
        points = [point for case in chosen for point in measured_points(case, engines=not arguments.no_engines)]
        torch.set_num_threads(1)
        points.append(trainer_point(measured_cpu(time.process_time)))
        tables.append(table("One CPU thread, processor time", points))
    for item in tables:
        item.show(console)
    stats = describe(environment(torch.device("cpu")))
    write_text(arguments.out / "results.md", f"{stats}\n\n" + "\n".join(item.to_markdown() for item in tables))


if __name__ == "__main__":
    main()
