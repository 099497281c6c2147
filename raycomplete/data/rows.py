"""Rows of the users' files that attacks and benchmarks read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import DataError


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL or CSV file, at least one.

    Args:
        path: The file.
        columns: Columns that every row must have.

    Raises:
        DataError: The file is missing, empty or malformed, or lacks a column.
    """
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                rows: list[Any] = list(csv.DictReader(stream))
        else:
            text = path.read_text(encoding="utf-8-sig")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise DataError(f"The file {path} cannot be read ({error.strerror}).", "Check the path.") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"The file {path} is no valid {path.suffix[1:] or 'JSONL'} ({error}).") from error
    if not rows:
        raise DataError(f"The file {path} holds no rows.", "Name another file.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if not isinstance(row, dict) or row.get(column) in (None, "")]
        if missing:
            raise DataError(f"Row {number} of {path} has no {missing[0]!r}.", f"Needed: {', '.join(columns)}.")
    return rows
