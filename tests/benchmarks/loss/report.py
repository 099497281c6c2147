"""Tables of a finished comparison, with the targets beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.benchmarks.environment import Table
from tests.benchmarks.loss.measure import Measurement
from tests.benchmarks.loss.problem import Mix, Shape
from tests.benchmarks.loss.variants import OURS, PLAIN

if TYPE_CHECKING:
    from tests.benchmarks.loss.run import Results

TIME_RATIO_CPU, MEMORY_RATIO_CPU = 1.0, 0.25
MIXED_MS_CUDA, MIXED_GB_CUDA = 150.0, 4.0
PUBLISHED = "Liger's published figures for its JSD at this shape on an H100: 60.7 ms, 11.1 GB (plain: 213 ms, 68.9 GB)"
_COLUMNS = ("", "median ms", "time / plain", "CPU time / plain", "peak MB", "less gradients MB", "peak / plain")
_COLUMNS += ("loss", "gradient error")
_WORDS = {
    Mix.ANCHOR: "all rows anchor",
    Mix.MIXED: "1/2 anchor, 1/4 recovery, 1/4 push-forward",
}


@dataclass(frozen=True)
class Target:
    """A bound that a release has to reach."""

    what: str
    wanted: str
    measured: str
    met: bool


def targets(results: Results) -> list[Target]:
    """The targets of the device at the points measured so far; none for a quick run, whose shapes mean nothing."""
    found: list[Target] = []

    def at_most(what: str, value: float | None, limit: float, form: str) -> None:
        if value is not None:
            found.append(Target(what, "at most " + form.format(limit), form.format(value), value <= limit))

    if results.quick:
        return found
    if results.device == "cpu":
        for mix in Mix:
            if point := results.point(results.main, mix):
                ours, plain = point[OURS], point[PLAIN]
                what = f"over plain PyTorch, {_WORDS[mix]}"
                at_most(f"time {what}", ours.ratio_to(plain), TIME_RATIO_CPU, "{:.2f}x")
                at_most(f"peak memory {what}", _peak_ratio(ours, plain), MEMORY_RATIO_CPU, "{:.2f}x")
        return found
    mixed = results.point(results.main, Mix.MIXED).get(OURS)
    if mixed is not None and mixed.median_s is not None and mixed.peak_bytes is not None:
        above, words = mixed.peak_bytes - mixed.gradient_bytes, _WORDS[Mix.MIXED]
        at_most(f"time, {words}", 1e3 * mixed.median_s, MIXED_MS_CUDA, "{:.1f} ms")
        at_most(f"memory above inputs and gradients, {words}", above / 1e9, MIXED_GB_CUDA, "{:.2f} GB")
    for shape in {item["shape"]: None for item in results.points}:
        rivals = results.point(shape, Mix.ANCHOR)
        best = min((item.median_s for name, item in rivals.items() if "Liger" in name and item.median_s), default=None)
        median_s = rivals[OURS].median_s if rivals else None
        if best is not None and median_s is not None:
            at_most(f"time over Liger's best, all rows anchor, {shape}", median_s / best, 1.0, "{:.2f}x")
    return found


def comparison(results: Results, shape: Shape, mix: Mix) -> Table:
    """Every variant at one point."""
    found = results.point(shape, mix)
    rows = [(name, *_cells(found[name], found[PLAIN])) for name in sorted(found, key=lambda name: (name != OURS, name))]
    if mix is Mix.ANCHOR:
        rows += [(name, why, *[""] * (len(_COLUMNS) - 2)) for name, why in results.missing.items()]
    title = f"Forward + backward, {_WORDS[mix]}, {shape}, bfloat16"
    if shape.student_hidden_size and results.device == "cuda" and not results.quick:
        title += f". {PUBLISHED}"
    return Table(title, _COLUMNS, rows)


def _peak_ratio(item: Measurement, plain: Measurement) -> float | None:
    return item.peak_bytes / plain.peak_bytes if item.peak_bytes is not None and plain.peak_bytes else None


def _cells(item: Measurement, plain: Measurement) -> tuple[str, ...]:
    if item.median_s is None:
        return (item.problem, *[""] * (len(_COLUMNS) - 2))
    less = None if item.peak_bytes is None else item.peak_bytes - item.gradient_bytes
    return (
        f"{1e3 * item.median_s:.1f}",
        _text(item.ratio_to(plain), "{:.2f}x"),
        _text(item.cpu_ratio_to(plain), "{:.2f}x"),
        *("" if value is None else f"{value / 1e6:.0f}" for value in (item.peak_bytes, less)),
        _text(_peak_ratio(item, plain), "{:.2f}x"),
        _text(item.loss, "{:.5f}"),
        _text(item.gradient_error, "{:.2%}"),
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
