"""Tables of a finished comparison, with the targets beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.benchmarks.loss.measure import Measurement
from tests.benchmarks.loss.problem import Mix, Shape
from tests.benchmarks.loss.variants import OURS, PLAIN
from tests.benchmarks.tables import Table

if TYPE_CHECKING:
    from tests.benchmarks.loss.run import Results

TIME_RATIO_CPU = 1.0
MEMORY_RATIO_CPU = 0.25
MIXED_S_CUDA = 0.150
MIXED_BYTES_CUDA = 4e9
PUBLISHED = "Liger's published figures for its JSD at this shape on an H100: 60.7 ms, 11.1 GB (plain: 213 ms, 68.9 GB)"

_NUM_CELLS = 8

_WORDS = {
    Mix.ANCHOR: "all rows anchor",
    Mix.MIXED: "1/2 anchor, 1/4 recovery, 1/4 push-forward",
}


@dataclass(frozen=True)
class Target:
    """Targets that a release has to reach."""

    what: str
    wanted: str
    measured: str
    met: bool


def targets(results: Results) -> list[Target]:
    """The targets of the device at the points measured so far; none for a quick run, whose shapes mean nothing."""
    if results.quick:
        return []
    return _targets_cpu(results) if results.device == "cpu" else _targets_cuda(results)


def _targets_cpu(results: Results) -> list[Target]:
    found = []
    for mix in Mix:
        if not (point := results.point(results.main, mix)):
            continue
        ours, plain = (point[name] for name in (OURS, PLAIN))
        time_ratio = ours.ratio_to(plain)
        if time_ratio is not None:
            what = f"time over plain PyTorch, {_WORDS[mix]}"
            found.append(_at_most(what, time_ratio, TIME_RATIO_CPU, "{:.2f}x"))
        if ours.peak_bytes is not None and plain.peak_bytes:
            what = f"peak memory over plain PyTorch, {_WORDS[mix]}"
            found.append(_at_most(what, ours.peak_bytes / plain.peak_bytes, MEMORY_RATIO_CPU, "{:.2f}x"))
    return found


def _targets_cuda(results: Results) -> list[Target]:
    found = []
    ours = results.point(results.main, Mix.MIXED).get(OURS)
    if ours is not None and ours.median_s is not None and ours.peak_bytes is not None:
        above, words = ours.peak_bytes - ours.gradient_bytes, _WORDS[Mix.MIXED]
        found.append(_at_most(f"time, {words}", 1e3 * ours.median_s, 1e3 * MIXED_S_CUDA, "{:.1f} ms"))
        what = f"memory above inputs and gradients, {words}"
        found.append(_at_most(what, above / 1e9, MIXED_BYTES_CUDA / 1e9, "{:.2f} GB"))
    for shape in {item["shape"]: None for item in results.points}:
        rivals = results.point(shape, Mix.ANCHOR)
        best = min((item.median_s for name, item in rivals.items() if "Liger" in name and item.median_s), default=None)
        median_s = rivals[OURS].median_s if rivals else None
        if best is not None and median_s is not None:
            what = f"time over Liger's best, all rows anchor, {shape}"
            found.append(_at_most(what, median_s / best, 1.0, "{:.2f}x"))
    return found


def _at_most(what: str, value: float, limit: float, form: str) -> Target:
    return Target(what, "at most " + form.format(limit), form.format(value), value <= limit)


def comparisons(results: Results) -> list[Table]:
    """A table for each point at which every variant was measured, and memory too."""
    return [
        comparison(results, item["shape"], item["mix"])
        for item in results.points
        if any(found.peak_bytes is not None for found in item["found"].values())
    ]


def summaries(results: Results, *, sweep: bool) -> list[Table]:
    """Tables over many points: by shape, growth, targets."""
    shown = [_sweep(results, Mix.ANCHOR), _sweep(results, Mix.MIXED), _slopes(results)] if sweep else []
    if goals := targets(results):
        rows = [(goal.what, goal.wanted, goal.measured, "yes" if goal.met else "no") for goal in goals]
        shown.append(Table("Targets", ("", "target", "measured", "met"), rows))
    return shown


def comparison(results: Results, shape: Shape, mix: Mix) -> Table:
    """Every variant at one point."""
    found = results.point(shape, mix)
    plain = found[PLAIN]
    rows = [(name, *_cells(found[name], plain)) for name in sorted(found, key=lambda name: (name != OURS, name))]
    if mix is Mix.ANCHOR:
        rows += [(name, why, *[""] * (_NUM_CELLS - 1)) for name, why in results.missing.items()]
    title = f"Forward + backward, {_WORDS[mix]}, {shape}, bfloat16"
    if shape.student_hidden_size and results.device == "cuda" and not results.quick:
        title += f". {PUBLISHED}"
    sizes = ("peak MB", "less gradients MB", "peak / plain")
    return Table(title, ("", "median ms", "time / plain", "CPU time / plain", *sizes, "loss", "gradient error"), rows)


def _cells(item: Measurement, plain: Measurement) -> tuple[str, ...]:
    if item.median_s is None:
        return (item.problem, *[""] * (_NUM_CELLS - 1))
    ratio, cpu_ratio = item.ratio_to(plain), item.cpu_ratio_to(plain)
    peak = item.peak_bytes
    assert item.loss is not None
    assert item.gradient_error is not None
    return (
        f"{1e3 * item.median_s:.1f}",
        "" if ratio is None else f"{ratio:.2f}x",
        "" if cpu_ratio is None else f"{cpu_ratio:.2f}x",
        "" if peak is None else f"{peak / 1e6:.0f}",
        "" if peak is None else f"{(peak - item.gradient_bytes) / 1e6:.0f}",
        "" if peak is None or not plain.peak_bytes else f"{peak / plain.peak_bytes:.2f}x",
        f"{item.loss:.5f}",
        f"{item.gradient_error:.2%}",
    )


def _sweep(results: Results, mix: Mix) -> Table:
    points = [item for item in results.points if item["mix"] is mix and not item["shape"].student_hidden_size]
    points.sort(key=lambda item: (item["shape"].num_rows, item["shape"].vocab_size, item["shape"].hidden_size))
    swept = set.intersection(*(set(item["found"]) for item in points))
    names = sorted(swept, key=lambda name: (name != OURS, name))
    rows = []
    for item in points:
        cells = []
        for name in names:
            median_s = item["found"][name].median_s
            ratio = item["found"][name].ratio_to(item["found"][PLAIN]) if median_s else None
            time = "" if median_s is None else f"{1e3 * median_s:.0f}"
            cells.append(time if ratio is None or name == PLAIN else f"{time} ({ratio:.2f}x)")
        rows.append((str(item["shape"]), *cells))
    return Table(f"Median ms (over plain PyTorch) by shape, {_WORDS[mix]}", ("", *names), rows)


def _slopes(results: Results) -> Table:
    names = sorted({item["variant"] for item in results.slopes}, key=lambda name: (name != OURS, name))
    rows = []
    for letter in ("N", "V", "H"):
        for mix in (Mix.ANCHOR, Mix.MIXED):
            slope = {i["variant"]: i["slope"] for i in results.slopes if (i["letter"], i["mix"]) == (letter, mix)}
            rows.append((f"{letter}, {mix}", *(f"{slope[name]:.2f}" if name in slope else "" for name in names)))
    return Table("Growth: exponent p of time ~ size^p, one size changed at a time", ("", *names), rows)
