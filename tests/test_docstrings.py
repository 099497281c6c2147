"""Docstrings say what a thing is or does: no riddles, no cross references in place of a sentence."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.tracked import ROOT, tracked_python

RIDDLE = re.compile(r"(Of|What|Whether|See)\b")
MORE_RIDDLES = re.compile(r"(How|Where|Which|Who|That of|As many)\b")  # where users and maintainers read them


def first_lines(path: Path) -> list[tuple[int, str]]:
    """Line and first words of every docstring of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Every string that stands alone: docstrings, and those below an attribute or a constant.
            found += [
                (item.lineno, item.value.value.strip().splitlines()[0])
                for item in node.body
                if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
                if isinstance(item.value.value, str) and item.value.value.strip()
            ]
    return found


def test_no_docstring_begins_with_a_riddle() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in tracked_python("raycomplete", "jobs", "tests", "docs")
        for line, text in first_lines(path)
        if RIDDLE.match(text) or (MORE_RIDDLES.match(text) and path.is_relative_to(ROOT / "raycomplete"))
    ] == []
