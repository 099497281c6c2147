"""Runs the trainers in turn, each in a process of its own, and leaves results.json and results.md in a folder."""

from __future__ import annotations

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
from tests.benchmarks.environment import describe, environment
from tests.benchmarks.tables import Table
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
_TIMEOUT_S = 1800.0


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

    def ratio(self, name: str, other: str) -> float | None:
        """Median over repeats of tokens a second over the other's in the same repeat."""
        pairs = zip(self.runs.get(name, []), self.runs.get(other, []), strict=False)
        ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs]
        return statistics.median(ratios) if ratios else None

    def cpu_ratio(self, name: str, other: str) -> float | None:
        """The same of tokens a second of processor time."""
        pairs = zip(self.runs.get(name, []), self.runs.get(other, []), strict=False)
        rates = [(mine.tokens_per_cpu_s, theirs.tokens_per_cpu_s) for mine, theirs in pairs]
        ratios = [mine / theirs for mine, theirs in rates if mine is not None and theirs is not None]
        return statistics.median(ratios) if ratios else None


def run(
    model: str,
    out: Path,
    *,
    repeats: int,
    threads: int | None = None,
    counted_steps: int = 3,
    only: Sequence[str] | None = None,
    console: Console | None = None,
) -> Results:
    """Measures, prints and writes.

    Args:
        model: Checkpoint of teacher and student (see `resolve_checkpoint`).
        out: Folder of results.json and results.md.
        repeats: Runs of each trainer.
        threads: CPU threads of each; all cores when absent.
        counted_steps: Steps of each run that are measured.
        only: Trainers to run; all of `TRAINERS` when absent.
        console: Where tables go.
    """
    console = console or Console(width=160)
    path = resolve_checkpoint(model, role="aligned")
    workload = Workload(
        path, path, ChatCodec(path).vocab_size, threads=threads or available_cpus(), counted_steps=counted_steps
    )
    results = Results(environment(torch.device("cpu")) | {"threads": workload.threads}, workload, model)
    console.print(describe(results.environment))
    names = [name for name in only or TRAINERS if not _missing(name, results)]
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            done = _in_own_process(TRAINERS[name], workload, KEEP_MEMORY if name == RIVAL_KEEPS_MEMORY else {})
            results.runs.setdefault(name, []).append(done)
            console.print(f"{name}: {done.tokens_per_s:.0f} tokens/s", style="dim")
    table = _table(results)
    table.show(console)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(_to_json(results), indent=2, default=str) + "\n")
    write_text(out / "results.md", f"{describe(results.environment)}\n\n{table.to_markdown()}")
    console.print(f"Written to {out}")
    return results


def _missing(name: str, results: Results) -> bool:
    if name.startswith("TRL") and find_spec("trl") is None:
        results.missing[name] = "not installed"
    return name in results.missing


def _in_own_process(
    trainer: Callable[[Workload], Throughput], workload: Workload, settings: Mapping[str, str]
) -> Throughput:
    """Memory, thread pools and environment of one trainer never meet another's."""
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    os.environ.update(settings)  # an allocator reads its settings when its process starts
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(trainer, workload).result(_TIMEOUT_S)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _table(results: Results) -> Table:
    rows = []
    for name, runs in results.runs.items():
        ratio, cpu_ratio = results.ratio(name, RIVAL), results.cpu_ratio(name, RIVAL)
        each = ", ".join(f"{run.tokens_per_s:.0f}" for run in runs)
        ratios = ("" if value is None else f"{value:.2f}x" for value in (ratio, cpu_ratio))
        rows.append((name, f"{results.median(name):.0f}", each, *ratios))
    rows += [(name, why, "", "", "") for name, why in results.missing.items()]
    work = results.workload
    title = (
        f"Training throughput, {results.model}, {work.batch} sequences a step in passes of "
        f"{work.per_device_batch_size}, {work.counted_steps} steps; target: {OURS} at least {TARGET_RATIO}x {RIVAL}"
    )
    return Table(title, ("", "tokens/s", "runs", f"over {RIVAL}", "by CPU time"), rows)


def _to_json(results: Results) -> dict[str, Any]:
    ratio = results.ratio(OURS, RIVAL)
    by_cpu = results.cpu_ratio(OURS, RIVAL)
    target = {
        "wanted": TARGET_RATIO,
        "measured": ratio,
        "by_cpu_time": by_cpu,
        "met": ratio is not None and ratio >= TARGET_RATIO,
    }
    return asdict(results) | {"tokens_per_s": {name: results.median(name) for name in results.runs}, "target": target}
