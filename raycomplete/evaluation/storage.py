"""Names of cells, and rows of completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raycomplete.files import PRIVATE, write_text


def content_hash(content: Any) -> str:
    """A short name of JSON-able content; equal content has equal names on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def write_completions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A row a line, readable by the owner only: these are answers to harmful prompts."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, text, mode=PRIVATE)
