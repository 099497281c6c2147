"""Runs the comparison and leaves results.json and results.md in a folder."""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.benchmarks.environment import describe, environment
from tests.benchmarks.loss import report
from tests.benchmarks.loss.measure import Measurement, check_agreement, compare, peak_bytes
from tests.benchmarks.loss.problem import Mix, Shape, build_problem
from tests.benchmarks.loss.variants import OURS, PLAIN, VARIANTS, Loss


@dataclass(frozen=True)
class Plan:
    """The measurements on a device.

    Attributes:
        main: Shape at which every variant runs with every mix, with peak memory.
        extra: More shapes of anchor rows, with every variant, with peak memory.
        rows, vocabulary, hidden: Other sizes of the main shape, one changed at a time.
        repeats: Timed passes at the main shape; `sweep_repeats` at the others.
    """

    main: Shape
    extra: tuple[Shape, ...]
    rows: tuple[int, ...]
    vocabulary: tuple[int, ...]
    hidden: tuple[int, ...]
    repeats: int
    sweep_repeats: int = 3

    def sweep(self) -> dict[str, list[Shape]]:
        """Shapes by the letter that grows in them, the main shape among them."""
        sizes = {"N": ("num_rows", self.rows), "V": ("vocab_size", self.vocabulary), "H": ("hidden_size", self.hidden)}
        return {
            letter: [replace(self.main, **{name: size}) for size in sorted({*values, getattr(self.main, name)})]
            for letter, (name, values) in sizes.items()
        }


PLANS = {
    "cpu": Plan(Shape(2048, 49152, 576), (), (512, 1024, 4096), (12288, 24576), (288, 1152), repeats=5),
    "cuda": Plan(
        Shape(8192, 128256, 4096),
        (Shape(8192, 128256, 4096, student_hidden_size=2048),),  # as in Liger's published figures
        (2048, 4096, 16384),
        (32064, 64128),
        (1024, 2048),
        repeats=10,
    ),
}
QUICK = Plan(Shape(128, 1024, 64), (Shape(128, 1024, 64, 32),), (64,), (512,), (32,), repeats=2, sweep_repeats=1)
"""No measurement: it shows within a minute that everything runs."""
SWEEP_ONLY = Plan(Shape(1024, 24576, 576), (), (512, 2048), (12288, 49152), (288, 1152), repeats=2, sweep_repeats=2)
"""How cost grows, for a few minutes of a CPU: smaller shapes, time alone."""


@dataclass
class Results:
    """Everything that was measured."""

    device: str
    quick: bool
    environment: dict[str, Any]
    main: Shape
    missing: dict[str, str] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    slopes: list[dict[str, Any]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    def point(self, shape: Shape, mix: Mix) -> dict[str, Measurement]:
        """Measurements by variant; empty if the point was not measured."""
        return next((item["found"] for item in self.points if (item["shape"], item["mix"]) == (shape, mix)), {})


def run(
    device: torch.device,
    out: Path,
    *,
    quick: bool = False,
    sweep: bool = True,
    sweep_only: bool = False,
    console: Console | None = None,
) -> Results:
    """Measures, prints and writes.

    Args:
        device: CPU or CUDA.
        out: Folder of results.json and results.md.
        quick: Tiny shapes.
        sweep: Also other shapes than the main one.
        sweep_only: `SWEEP_ONLY` in place of everything else.
        console: Where tables go.
    """
    console = console or Console(width=160)
    plan = SWEEP_ONLY if sweep_only else QUICK if quick else PLANS[device.type]
    results = Results(device.type, quick or sweep_only, environment(device), plan.main)
    console.print(describe(results.environment))
    losses = _load_all(results)
    out.mkdir(parents=True, exist_ok=True)
    points = [] if sweep_only else [(plan.main, mix) for mix in Mix]
    points += [(shape, Mix.ANCHOR) for shape in plan.extra]
    for shape, mix in points:
        _measure(results, losses, shape, mix, device, plan.repeats, with_memory=True, console=console)
        _write_json(results, out)  # whoever ends it early keeps what was measured
    swept = {variant.name: losses[variant.name] for variant in VARIANTS if variant.in_sweep and variant.name in losses}
    for letter, shapes in plan.sweep().items() if sweep else ():
        for mix in (Mix.ANCHOR, Mix.MIXED):
            for shape in shapes:
                if not results.point(shape, mix):
                    _measure(results, swept, shape, mix, device, plan.sweep_repeats, with_memory=False, console=console)
            _add_slopes(results, letter, shapes, mix)
    summaries = report.summaries(results, sweep=sweep)
    for table in summaries:
        table.show(console)
    tables = [*report.comparisons(results), *summaries]
    _write_json(results, out)
    write_text(out / "results.md", describe(results.environment) + "\n\n" + "\n".join(t.to_markdown() for t in tables))
    console.print(f"Written to {out}")
    return results


def _load_all(results: Results) -> dict[str, Loss]:
    losses: dict[str, Loss] = {}
    for variant in VARIANTS:
        if results.device not in variant.devices:
            results.missing[variant.name] = f"runs on {' and '.join(variant.devices)} only"
            continue
        try:
            losses[variant.name] = variant.load()
        except (ImportError, RuntimeError) as error:  # TRL turns a missing dependency into a RuntimeError
            results.missing[variant.name] = f"not installed ({error})"
    return losses


def _measure(
    results: Results,
    losses: dict[str, Loss],
    shape: Shape,
    mix: Mix,
    device: torch.device,
    repeats: int,
    *,
    with_memory: bool,
    console: Console,
) -> None:
    able = [variant.name for variant in VARIANTS if variant.name in losses and variant.takes(mix, device)]
    able.sort(key=lambda name: name != PLAIN)  # the others are held against it
    problem = build_problem(shape, mix, device)
    found = compare({name: losses[name] for name in able}, problem, repeats)
    del problem
    gc.collect()
    results.disagreements += [f"{shape}, {mix}: {line}" for line in check_agreement(found, PLAIN, OURS)]
    if with_memory:
        for name, item in found.items():
            if not item.problem:
                item.peak_bytes = peak_bytes(name, shape, mix, device)
    results.points.append({"shape": shape, "mix": mix, "found": found})
    if with_memory:
        report.comparison(results, shape, mix).show(console)
    else:
        console.print(f"measured {mix} at {shape}", style="dim")


def _add_slopes(results: Results, letter: str, shapes: Sequence[Shape], mix: Mix) -> None:
    field_of = {"N": "num_rows", "V": "vocab_size", "H": "hidden_size"}[letter]
    points = [(getattr(shape, field_of), results.point(shape, mix)) for shape in shapes]
    for name in points[0][1]:
        timed = [(size, s) for size, found in points if name in found and (s := found[name].median_s) is not None]
        if len(timed) > 1:
            results.slopes.append({"letter": letter, "mix": mix, "variant": name, "slope": log_log_slope(timed)})


def log_log_slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent p of the least-squares fit time ~ size^p."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def _write_json(results: Results, out: Path) -> None:
    plain = asdict(results)
    for item, point in zip(plain["points"], results.points, strict=True):
        item["found"] = {name: asdict(found) | {"median_s": found.median_s} for name, found in point["found"].items()}
    plain["targets"] = [asdict(target) for target in report.targets(results)]
    write_text(out / "results.json", json.dumps(plain, indent=2) + "\n")
