"""Rows of users' files: every format, and rows that lack a value."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycomplete.data.rows import load_rows, read_rows
from raycomplete.runtime.errors import DataError

ROWS = [{"goal": "bake", "target": "Sure"}, {"goal": "steal, “it”", "target": "No"}]


@pytest.mark.parametrize("ending", [".jsonl", ".NDJSON", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        texts = {".json": json.dumps(ROWS), ".csv": 'goal,target\nbake,Sure\n"steal, “it”",No\n'}
        path.write_text(texts.get(ending, "\n\n".join(map(json.dumps, ROWS))), encoding="utf-8-sig")
    assert load_rows(path) == read_rows(path, ("goal", "target")) == ROWS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no rows"),
        ('[{"goal": "x"}]', "Row 1 of .* has no 'target'. Needed: goal, target"),
        ('[{"goal": "x", "target": "y"}, {"goal": "x", "target": ""}]', "Row 2 of .* has no 'target'"),
        ('["text"]', "Row 1 of .* has no 'goal'"),
        ("{", "cannot be read as json"),
    ],
)
def test_a_row_without_a_value_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_rows(path, ("goal", "target"))
