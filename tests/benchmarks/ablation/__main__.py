"""`python -m tests.benchmarks.ablation --run-file jobs/organism.yaml --out FOLDER [key=value ...]`.

What each part of the method is worth: the same run file trained and evaluated again and again with one thing changed.
Finished configurations are not run again, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.ablation.run import CONFIGURATIONS, run
from tests.benchmarks.environment import RUNS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ablation", description=__doc__)
    parser.add_argument("--run-file", type=Path, required=True, help="what is changed one thing at a time")
    parser.add_argument("--out", type=Path, default=RUNS / "ablation", help="folder of runs, results.json, results.md")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, help="run these and read what is there of others")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every configuration")
    arguments = parser.parse_args()
    run(arguments.run_file, arguments.out, arguments.overrides, only=arguments.only)


if __name__ == "__main__":
    main()
