"""Docstrings say what a thing is or does: no riddles, no cross references in place of a sentence."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RIDDLE = re.compile(r"(Of|What|Whether|See)\b")


def first_lines(path: Path) -> list[tuple[int, str]]:
    """Line and first words of every docstring of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((getattr(node, "lineno", 1), text.splitlines()[0]))
    return found


def test_no_docstring_begins_with_a_riddle() -> None:
    files = [*(ROOT / "raycomplete").rglob("*.py"), *(ROOT / "jobs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in sorted(files)
        for line, text in first_lines(path)
        if RIDDLE.match(text)
    ] == []
