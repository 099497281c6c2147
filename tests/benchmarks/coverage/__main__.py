"""`python -m tests.benchmarks.coverage --out FOLDER`: how often intervals of means hold the truth."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from raycomplete.evaluation.statistics import mean_over_runs, mean_over_trials
from raycomplete.runtime.files import write_json, write_text
from tests.benchmarks.coverage.simulation import MODELS, coverage, seeds_and_prompts
from tests.benchmarks.environment import RUNS
from tests.benchmarks.tables import Table

RATES, CORRELATIONS, PROMPTS, DEPTHS = (0.005, 0.01, 0.03, 0.1), (0.0, 0.7, 0.9), (50, 100, 200), (5, 10)
LUCK, NUM_RUNS = (0.0, 0.3, 1.0), (2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.coverage", description=__doc__)
    parser.add_argument("--repeats", type=int, default=4_000, help="simulated evaluations of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RUNS / "coverage", help="folder of results.json and results.md")
    given = parser.parse_args()
    over_depths = _over_depths(given.repeats, given.seed)
    over_runs = _over_runs(given.repeats // 4, given.seed)
    tables = [
        Table(
            f"Mean over depths: coverage, lowest to highest of both models at 5 and 10 depths, {given.repeats} repeats",
            ["rate", "correlation", *(f"{prompts} prompts" for prompts in PROMPTS)],
            [
                [f"{rate:g}", f"{like:g}", *(_span(over_depths, (rate, like, prompts)) for prompts in PROMPTS)]
                for rate, like in product(RATES, CORRELATIONS)
            ],
        ),
        Table(
            f"Mean over runs: coverage at 100 prompts and 6 depths, {given.repeats // 4} repeats",
            ["rate", "luck of a seed", *(f"{runs} runs" for runs in NUM_RUNS)],
            [
                [f"{rate:g}", f"{luck:g}", *(_span(over_runs, (rate, luck, runs)) for runs in NUM_RUNS)]
                for rate, luck in product(RATES, LUCK)
            ],
        ),
    ]
    for table in tables:
        table.show(Console(width=100))
    write_json(given.out / "results.json", {**vars(given), "out": str(given.out), "cases": over_depths + over_runs})
    write_text(given.out / "results.md", "\n".join(table.to_markdown() for table in tables))


def _over_depths(repeats: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for model, rate, correlation, prompts, depths in product(MODELS, RATES, CORRELATIONS, PROMPTS, DEPTHS):
        generator = np.random.default_rng(seed)
        tables = MODELS[model](generator, rate, correlation, prompts, num_depths=depths, repeats=repeats)
        held = coverage(tables, depths, rate, mean_over_trials)
        found.append({"case": (rate, correlation, prompts), "model": model, "depths": depths, "coverage": held})
    return found


def _over_runs(repeats: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for rate, luck, runs in product(RATES, LUCK, NUM_RUNS):
        held = 0
        generator = np.random.default_rng(seed)
        for table_RN in seeds_and_prompts(generator, rate, luck, runs, num_depths=6, repeats=repeats) / 6:
            mean = mean_over_runs([{str(n): share for n, share in enumerate(row)} for row in table_RN.tolist()], 6)
            held += mean["low"] <= rate <= mean["high"]
        found.append({"case": (rate, luck, runs), "coverage": held / repeats})
    return found


def _span(found: list[dict[str, Any]], case: tuple[float, float, int]) -> str:
    held = sorted(item["coverage"] for item in found if item["case"] == case)
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (held[0], held[-1])))


if __name__ == "__main__":
    main()
