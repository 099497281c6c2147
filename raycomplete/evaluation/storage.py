"""Result files that are either whole or absent, whatever kills the process."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def content_hash(content: Any) -> str:
    """A short name of JSON-able content; equal content has equal names on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file atomically and durably: a reader, or the next run after a crash, sees the old file or the new."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Same, a row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Same, for text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each writer: several roles may be evaluated into one run folder at a time.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        # Lone surrogates may come out of a byte-level decoder; they must not cost a finished cell.
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def read_json(path: Path) -> dict[str, Any] | None:
    """A stored mapping, or None where there is none or it cannot be read: then it is simply made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
