"""`python -m tests.benchmarks.loss --device cuda --out FOLDER`, without pytest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.benchmarks.environment import RUNS
from tests.benchmarks.loss.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loss", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of results.json and results.md (default: runs/bench/loss-*)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    arguments = parser.parse_args()
    out = arguments.out or RUNS / f"loss-{arguments.device}{'-quick' if arguments.quick else ''}"
    results = run(torch.device(arguments.device), out, quick=arguments.quick)
    for line in results.disagreements:
        print(f"Not the same loss: {line}", file=sys.stderr)
    return 1 if results.disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
