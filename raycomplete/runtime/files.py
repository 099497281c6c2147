"""Files that are either whole or absent, whatever kills the process."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

PRIVATE = 0o600  # for what holds harmful text or tokens


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Writes a file atomically and durably: a reader, or the next run after a crash, sees the old file or the new.

    Args:
        path: Its folder is made where missing.
        content: The whole content.
        mode: Permissions, in force from the first byte on.
    """
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
    """As `write_bytes`, in UTF-8; lone surrogates of a byte-level decoder are escaped rather than refused."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode=mode)


def write_json(path: Path, content: Any, *, mode: int = 0o644) -> None:
    """As `write_text`; NaN and infinity are refused, since no reader of JSON agrees on them."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def read_json(path: Path) -> dict[str, Any] | None:
    """A stored mapping, or None where there is none or it cannot be read: then it is simply made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
