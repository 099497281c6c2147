"""metrics.jsonl: what every finished step measured, across kills and resumes. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import named_when_full


class MetricsFile:
    """metrics.jsonl: one row a step, whole rows only.

    Args:
        path: The file.
        keep_steps: Rows after this step are dropped, since a resumed run makes them anew.
    """

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
    """Reads metrics.jsonl while it grows, every row once.

    Args:
        path: The file, which need not exist yet.
    """

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
