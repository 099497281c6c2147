"""Reads prompts from the user's files: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raycomplete.config import PromptSource
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind

_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that spreadsheets put first


def read_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> list[Prompt]:
    """All prompts of several files, repeats dropped (same text, first wins).

    Args:
        sources: Files and their columns.
        kind: What the prompts are.
        seed: Draws the rows that a source's `limit` keeps.

    Raises:
        DataError: A file is missing, malformed or empty, or lacks a column.
    """
    prompts: dict[str, Prompt] = {}
    for source in sources:
        rows = enumerate(_rows(source.path))  # numbered before `where`, so that a number points into the file
        found = [
            prompt
            for index, row in rows
            if matches(row, source) and (prompt := prompt_of(row, index, source, kind)) is not None
        ]
        if not found:
            condition = f" with {source.where}" if source.where else ""
            raise DataError(f"The prompt file {source.path} has no prompts{condition}.", "Check its rows and `where`.")
        if source.limit is not None and source.limit < len(found):
            found = random.Random(f"{seed}:{source.path.name}").sample(found, source.limit)
        for prompt in found:
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"The prompt file {path} does not exist.", "Paths are relative to the run file.")
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
                return list(pq.read_table(path).to_pylist())
            case other:
                raise DataError(f"The prompt file {path} ends in {other!r}.", "Use .jsonl, .json, .csv or .parquet.")
    except (ValueError, TypeError, csv.Error, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The prompt file {path} cannot be read as {path.suffix[1:]} ({error}).") from error


def matches(row: dict[str, Any], source: PromptSource) -> bool:
    _require(row, list(source.where), source)
    # CSV knows no types, so `refusal_cue: true` must also match the text "true".
    return all(str(row[column]).strip().lower() == str(value).lower() for column, value in source.where.items())


def prompt_of(row: dict[str, Any], index: int, source: PromptSource, kind: PromptKind) -> Prompt | None:
    _require(row, [source.prompt, *(name for name in (source.context, source.answer) if name)], source)
    text = str(row[source.prompt] or "").strip()
    context = str(row[source.context] or "").strip() if source.context else ""
    if not text:
        return None
    answer = str(row[source.answer] or "").strip() if source.answer else ""
    full = f"{text}\n\n{context}" if context else text
    # The digest keeps ids apart where two files share a name, or two sources read other columns of one row.
    digest = hashlib.sha256(full.encode()).hexdigest()[:6]
    stem = source.path.stem
    return Prompt(f"{stem}-{index:05d}-{digest}", full, kind, answer or None, stem)


def _require(row: Any, columns: Iterable[str], source: PromptSource) -> None:
    if not isinstance(row, dict):
        raise DataError(f"The prompt file {source.path} must hold one object a row, found {type(row).__name__}.")
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(
            f"The prompt file {source.path} has no column {missing[0]!r}.", f"Its columns: {', '.join(map(str, row))}."
        )
