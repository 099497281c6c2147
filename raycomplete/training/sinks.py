"""Metrics in TensorBoard and Weights & Biases, for those who watch runs there, beside metrics.jsonl."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import write_text


def open_sinks(names: Sequence[str], folder: Path) -> list[TensorBoardSink | WandbSink]:
    """Opens the sinks of a run.

    Args:
        names: "tensorboard" or "wandb".
        folder: Run folder; files go below it, and its name names the run.

    Raises:
        SetupError: A sink's package is not installed.
    """
    kinds: dict[str, type[TensorBoardSink | WandbSink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [kinds[name](folder) for name in names]


class TensorBoardSink:
    """Writes event files to `<run folder>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        self._writer = _package("tensorboard", "tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes the row of a finished step."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes what is left."""
        self._writer.close()


class WandbSink:
    """Fills a Weights & Biases run named after the run folder; project and mode come from wandb's own environment."""

    def __init__(self, folder: Path) -> None:
        # The id is drawn once for a folder: other folders have the same name, and rows of one run must stay together.
        file = folder / "wandb_id"
        if not file.is_file():
            write_text(file, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
        run_id = file.read_text(encoding="utf-8").strip()
        self._run = _package("wandb", "wandb").init(name=folder.name, id=run_id, dir=str(folder), resume="allow")

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes the row of a finished step."""
        self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """Flushes what is left."""
        self._run.finish()


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a row under slash-separated names; lists by index, what is not a number left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, bool) or name == "step":
            continue
        if isinstance(value, int | float):
            found[prefix + name] = float(value)
        elif isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found |= scalars({str(index): item for index, item in enumerate(value)}, f"{prefix}{name}/")
    return found


def _package(sink: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SetupError(f"train.sinks names {sink}, which is not installed.", f"pip install {package}") from error
