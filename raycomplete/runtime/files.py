"""Files that a killed process leaves whole or absent: atomic writes, and rows that are appended whole.

<run folder>/trials/<model>.jsonl       responses of models as token ids; readable by the owner only
<run folder>/judgements/<judge>.jsonl   what a judge made of them
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PRIVATE = 0o600  # for what holds harmful text or tokens


def cache_folder() -> Path:
    """Returns the folder of what can be made anew: RAYCOMPLETE_CACHE, or `raycomplete` in the user's cache folder."""
    chosen = os.environ.get("RAYCOMPLETE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raycomplete"


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Writes a file atomically and durably: a reader, or the next run after a crash, sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each writer: several processes may write into one run folder at a time.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
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


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Writes text as `write_bytes` does, in UTF-8; lone surrogates of a byte-level decoder are escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode=mode)


def write_json(path: Path, content: Any, *, mode: int = 0o644) -> None:
    """Writes JSON as `write_bytes` does; NaN and infinity are refused, since readers of JSON disagree on them."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a mapping; None where there is none or it cannot be read, so that it is made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def content_hash(content: Any) -> str:
    """Names JSON-able content by 32 hex digits; equal content has equal names on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


class RowStore:
    """Rows by key in one file that only grows.

    Rows of one call are written by one call of the system and are on the disk when `add` returns, so that a process
    that is killed loses at most the call it was in. A last line without its end is dropped and made again.
    """

    def __init__(self, path: Path, *, mode: int = 0o644) -> None:
        self._path = path
        self._mode = mode
        self._rows: dict[str, dict[str, Any]] = {}
        self._torn = False
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            row = _parsed(line)
            if row is not None:
                self._rows.setdefault(row["key"], row)

    def get(self, key: str) -> dict[str, Any]:
        """Returns the row of a key, or an empty one."""
        return self._rows.get(key, {})

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def values(self) -> Iterable[dict[str, Any]]:
        """Returns all rows, in the order of the file."""
        return self._rows.values()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows, each with its `key`; keys that are there already are left as they are."""
        new = {row["key"]: dict(row) for row in rows if row["key"] not in self._rows}
        if not new:
            return
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new.values())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._mode)
        try:
            _write_all(file, (("\n" if self._torn else "") + lines).encode("ascii"))
            os.fsync(file)
        finally:
            os.close(file)
        self._torn = False
        self._rows |= new


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, mode: int = 0o644) -> None:
    """Writes JSON, a row a line."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, text, mode=mode)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "key" in row else None


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
