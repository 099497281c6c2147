"""Values by formula beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.tables import Table


@dataclass(frozen=True)
class Point:
    """One comparison.

    Attributes:
        what: Model, role and shape.
        unit: Of both numbers.
        predicted: By the formulas.
        measured: On the hardware.
        fitted: Whether a constant of the formulas was taken from this very measurement.
    """

    what: str
    unit: str
    predicted: float
    measured: float
    fitted: bool = False

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def error(self) -> float:
        """How many times too large or too small, less one."""
        return max(self.ratio, 1 / self.ratio) - 1


def table(title: str, points: list[Point]) -> Table:
    """Predicted, measured, ratio."""
    rows = [
        (
            point.what,
            f"{point.predicted:,.4g} {point.unit}",
            f"{point.measured:,.4g} {point.unit}",
            f"{point.ratio:.2f}",
            "fitted" if point.fitted else "",
        )
        for point in points
    ]
    free = [point for point in points if not point.fitted]
    worst = max(free, key=lambda point: point.error, default=None)
    note = "" if worst is None else f"; largest error of a prediction: a factor of {1 + worst.error:.2f} ({worst.what})"
    return Table(title + note, ("", "predicted", "measured", "ratio", ""), rows)
