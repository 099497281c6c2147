"""The measurements of every finished step: metrics.jsonl, TensorBoard, Weights & Biases, trackio. Needs no torch."""

from __future__ import annotations

import importlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import named_when_full


class MetricsFile:
    """metrics.jsonl: one row a step, whole rows only."""

    def __init__(self, path: Path, keep_steps: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= keep_steps]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds the row of a finished step."""
        line = json.dumps(finite(row), allow_nan=False) + "\n"
        what = f"the metrics of step {row['step']}"
        with named_when_full(self._path.parent, what), self._path.open("a", encoding="utf-8") as stream:
            stream.write(line)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know; in mappings and lists at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of finished steps; a last line cut off by a kill is left out."""
    return MetricsReader(path).rows()


class MetricsReader:
    """Reads metrics.jsonl while it grows, every row once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None  # a resumed run replaces the file
        self._offset = 0
        self._rows: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the steps that are finished now; a last line cut off by a kill is left out."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            self._file, self._offset, self._rows = None, 0, []
            return []
        with stream:
            file = os.fstat(stream.fileno())
            if file.st_ino != self._file or file.st_size < self._offset:
                self._file, self._offset, self._rows = file.st_ino, 0, []
            stream.seek(self._offset)
            for line in stream:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if row is None:
                    break
                self._rows.append(row)
                self._offset += len(line)
        return list(self._rows)


@dataclass(frozen=True)
class Sink:
    """Takes the row of each finished step, for those who watch runs elsewhere."""

    write: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def open_sinks(names: Sequence[str], folder: Path) -> list[Sink]:
    """Opens the sinks of a run."""
    kinds = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    return [kinds[name](folder) for name in names]


def _tensorboard(folder: Path) -> Sink:
    writer = _package("tensorboard", "tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            writer.add_scalar(name, value, row["step"])

    return Sink(write, writer.close)


def _wandb(folder: Path) -> Sink:
    """A run named after the run folder; project and mode come from wandb's own environment."""
    package = _package("wandb", "wandb")
    run = package.init(name=folder.name, id=_run_id(folder, "wandb"), dir=str(folder), resume="allow")
    return Sink(lambda row: run.log(scalars(row), step=row["step"]), run.finish)


def _trackio(folder: Path) -> Sink:
    """A run of the project raycomplete; where it is kept comes from trackio's own environment, else on this machine."""
    package = _package("trackio", "trackio")
    run = package.init(project="raycomplete", name=_run_id(folder, "trackio"), resume="allow", embed=False)
    return Sink(lambda row: run.log(scalars(row), step=row["step"]), run.finish)


def _run_id(folder: Path, sink: str) -> str:
    """Draws a name once for a folder: other folders have the same name, and rows of one run must stay together."""
    file = folder / f"{sink}_id"
    if not file.is_file():
        write_text(file, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()


def _package(sink: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SetupError(f"train.sinks names {sink}, which is not installed.", f"pip install {package}") from error


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a row under slash-separated names; lists by index, what is not a number left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = float(value)
        elif isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found |= scalars({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}/")
    return found
