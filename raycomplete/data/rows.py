"""Reads the rows of users' files: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import DataError

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put first


def load_rows(path: Path, what: str = "file") -> list[Any]:
    """Reads all rows of a file; a row of a wrong kind is left to the caller.

    Args:
        path: The file; its ending names the format.
        what: Name of such files in messages: "prompt file".

    Raises:
        DataError: The file is missing or malformed.
    """
    if not path.is_file():
        raise DataError(f"The {what} {path} cannot be read: it does not exist.", "Paths are relative to the run file.")
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                # Not splitlines(): it also cuts at U+2028 and its like, which may stand inside a JSON string.
                return [json.loads(line) for line in path.read_text(_ENCODING).split("\n") if line.strip()]
            case ".json":
                return list(json.loads(path.read_text(_ENCODING)))
            case ".csv":
                with path.open(newline="", encoding=_ENCODING) as stream:
                    return list(csv.DictReader(stream))
            case ".parquet":
                import pyarrow.parquet as pq  # heavy, and the settings of attacks import this file

                return list(pq.read_table(path).to_pylist())
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise DataError(f"The {what} {path} cannot be read as {path.suffix[1:]} ({error}).") from error
    raise DataError(f"The {what} {path} ends in {path.suffix!r}.", "Use .jsonl, .json, .csv or .parquet.")


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the rows of a file, at least one, and checks that each has a value in every column.

    Raises:
        DataError: The file is missing, empty or malformed, or a row lacks a value.
    """
    rows = load_rows(path)
    if not rows:
        raise DataError(f"The file {path} holds no rows.", "Name another file.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if not isinstance(row, dict) or row.get(column) in (None, "")]
        if missing:
            raise DataError(f"Row {number} of {path} has no {missing[0]!r}.", f"Needed: {', '.join(columns)}.")
    return rows
