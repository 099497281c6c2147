"""Measures every variant at every point of a plan and leaves results.json and results.md in a folder."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.benchmarks.environment import Table, describe, environment
from tests.benchmarks.loss import report
from tests.benchmarks.loss.measure import Measurement, check_agreement, compare, peak_bytes
from tests.benchmarks.loss.problem import Mix, Shape, build_problem
from tests.benchmarks.loss.variants import OURS, PLAIN, VARIANTS, Loss


@dataclass(frozen=True)
class Plan:
    """The shapes of a device: every variant runs at each, and every mix at the first."""

    main: Shape
    extra: tuple[Shape, ...]  # of anchor rows alone
    repeats: int


PLANS = {
    "cpu": Plan(Shape(2048, 49152, 576), (), repeats=5),
    # The second shape is that of Liger's published figures.
    "cuda": Plan(Shape(8192, 128256, 4096), (Shape(8192, 128256, 4096, student_hidden_size=2048),), repeats=10),
}
# No measurement: it shows within a minute that everything runs.
QUICK = Plan(Shape(128, 1024, 64), (Shape(128, 1024, 64, 32),), repeats=2)


@dataclass
class Results:
    """Everything that was measured."""

    device: str
    quick: bool
    environment: dict[str, Any]
    main: Shape
    missing: dict[str, str] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    def point(self, shape: Shape, mix: Mix) -> dict[str, Measurement]:
        """Measurements by variant; empty if the point was not measured."""
        return next((item["found"] for item in self.points if (item["shape"], item["mix"]) == (shape, mix)), {})


def run(device: torch.device, out: Path, *, quick: bool = False, console: Console | None = None) -> Results:
    """Measures, prints and writes."""
    console = console or Console(width=160)
    plan = QUICK if quick else PLANS[device.type]
    results = Results(device.type, quick, environment(device), plan.main)
    console.print(describe(results.environment))
    losses = _load_all(results)
    out.mkdir(parents=True, exist_ok=True)
    points = [*((plan.main, mix) for mix in Mix), *((shape, Mix.ANCHOR) for shape in plan.extra)]
    tables = []
    for shape, mix in points:
        _measure(results, losses, shape, mix, plan.repeats)
        tables.append(report.comparison(results, shape, mix))
        tables[-1].show(console)
        _write_json(results, out)  # a benchmark that is ended early keeps what was measured
    if goals := report.targets(results):
        rows = [(goal.what, goal.wanted, goal.measured, "yes" if goal.met else "no") for goal in goals]
        tables.append(Table("Targets", ("", "target", "measured", "met"), rows))
        tables[-1].show(console)
    text = "\n".join(table.to_markdown() for table in tables)
    write_text(out / "results.md", f"{describe(results.environment)}\n\n{text}")
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


def _measure(results: Results, losses: dict[str, Loss], shape: Shape, mix: Mix, repeats: int) -> None:
    device = torch.device(results.device)
    able = [variant.name for variant in VARIANTS if variant.name in losses and variant.takes(mix, device)]
    able.sort(key=lambda name: name != PLAIN)  # the others are held against it
    problem = build_problem(shape, mix, device)
    found = compare({name: losses[name] for name in able}, problem, repeats)
    del problem
    gc.collect()
    results.disagreements += [f"{shape}, {mix}: {line}" for line in check_agreement(found, PLAIN, OURS)]
    for name, item in found.items():
        if not item.problem:
            item.peak_bytes = peak_bytes(name, shape, mix, device)
    results.points.append({"shape": shape, "mix": mix, "found": found})


def _write_json(results: Results, out: Path) -> None:
    plain = asdict(results)
    for item, point in zip(plain["points"], results.points, strict=True):
        item["found"] = {name: asdict(found) | {"median_s": found.median_s} for name, found in point["found"].items()}
    plain["targets"] = [asdict(target) for target in report.targets(results)]
    write_text(out / "results.json", json.dumps(plain, indent=2) + "\n")
