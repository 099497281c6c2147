"""Metrics for those who watch runs elsewhere: TensorBoard and Weights & Biases, beside metrics.jsonl."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import write_text


class Sink(Protocol):
    """Takes one row of metrics after another."""

    def write(self, row: Mapping[str, Any]) -> None:
        """A finished step."""

    def close(self) -> None:
        """Flushes what is left."""


def open_sinks(names: Sequence[str], folder: Path) -> list[Sink]:
    """The sinks of a run.

    Args:
        names: "tensorboard" or "wandb".
        folder: Run folder; files go below it, and its name names the run.

    Raises:
        SetupError: A sink's package is not installed.
    """
    kinds: dict[str, type[TensorBoardSink | WandbSink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [kinds[name](folder) for name in names]


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


class TensorBoardSink:
    """Event files in `<run folder>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise SetupError(
                "train.sinks names tensorboard, which is not installed.", "pip install tensorboardX"
            ) from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink`."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run named after the run folder; project and mode come from wandb's own environment."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SetupError("train.sinks names wandb, which is not installed.", "pip install wandb") from error
        self._run: Any = wandb.init(name=folder.name, id=_run_id(folder), dir=str(folder), resume="allow")

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """Drawn once for a run folder: other runs have folders of the same name, and rows of one run must stay together."""
    file = folder / "wandb_id"
    if not file.is_file():
        write_text(file, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()
