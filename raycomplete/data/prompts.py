"""Reads prompts from users' files."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raycomplete.config import PromptSource
from raycomplete.config.diagnosis import PromptColumns
from raycomplete.data.rows import load_rows
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind


def read_prompts(sources: Sequence[PromptSource], kind: PromptKind, seed: int = 0) -> list[Prompt]:
    """Reads all prompts of several files, repeats dropped (same text, first wins).

    Args:
        seed: Draws the rows that a source's `limit` keeps.

    Raises:
        DataError: A file is missing, malformed or empty, or lacks a column.
    """
    prompts: dict[str, Prompt] = {}
    for source in sources:
        found = list(select_prompts(load_rows(source.path, "prompt file"), source, source.path, kind))
        if not found:
            raise no_prompts("file", source.path, source)
        if source.limit is not None and source.limit < len(found):
            found = random.Random(f"{seed}:{source.path.name}").sample(found, source.limit)
        for prompt in found:
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def select_prompts(rows: Iterable[Any], columns: PromptColumns, path: Path, kind: PromptKind) -> Iterable[Prompt]:
    """Yields the prompts of rows that meet the conditions of `columns.where`; rows without a text are left out.

    Args:
        path: File that the rows come from; it names the prompts.

    Raises:
        DataError: A row is no mapping, or lacks a column.
    """
    needed = [columns.prompt, *(name for name in (columns.context, columns.answer) if name)]
    for index, row in enumerate(rows):  # numbered before `where`, so that a number points into the file
        _require(row, list(columns.where), path)
        # CSV knows no types, so `refusal_cue: true` must also match the text "true".
        if any(str(row[name]).strip().lower() != str(value).lower() for name, value in columns.where.items()):
            continue
        _require(row, needed, path)
        text, context, answer = (
            str(row[name] or "").strip() if name else "" for name in (columns.prompt, columns.context, columns.answer)
        )
        if not text:
            continue
        full = f"{text}\n\n{context}" if context else text
        # The digest keeps ids apart where two files share a name, or two sources read other columns of one row.
        digest = hashlib.sha256(full.encode()).hexdigest()[:6]
        yield Prompt(f"{path.stem}-{index:05d}-{digest}", full, kind, answer or None, path.stem)


def no_prompts(what: str, path: Path | str, columns: PromptColumns) -> DataError:
    """Returns the error of a source without prompts."""
    condition = f" with {columns.where}" if columns.where else ""
    return DataError(f"The prompt {what} {path} has no prompts{condition}.", "Check its rows and `where`.")


def _require(row: Any, names: Sequence[str], path: Path) -> None:
    if not isinstance(row, dict):
        raise DataError(f"The prompt file {path} must hold one object a row, found {type(row).__name__}.")
    if missing := [name for name in names if name not in row]:
        raise DataError(
            f"The prompt file {path} has no column {missing[0]!r}.", f"Its columns: {', '.join(map(str, row))}."
        )
