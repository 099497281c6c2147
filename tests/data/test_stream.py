"""Streams from every kind of file, and partitions that are whole or absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycomplete.config import PromptSource
from raycomplete.data.prompts import read_prompts
from raycomplete.data.stream import stream_prompts
from raycomplete.runtime.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"goal": "how to boil an egg", "note": "", "target": "Put it in water.", "safe": True},
    {"goal": "how to  boil\u2028an egg?", "note": "hard", "target": "", "safe": True},
    {"goal": "how to boil an egg", "note": "", "target": "a repeat", "safe": True},
    {"goal": "NA", "note": "", "target": "null", "safe": True},
    {"goal": "left out", "note": "", "target": "x", "safe": False},
    {"goal": " ", "note": "", "target": "x", "safe": True},
]
COLUMNS: dict[str, Any] = {"prompt": "goal", "context": "note", "answer": "target", "where": {"safe": True}}


def write(folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"prompts{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(*sources: PromptSource, seed: int = 0) -> list[str]:
    return [prompt.text for prompt in stream_prompts(sources, "benign", seed)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_stream_holds_what_reading_at_once_holds(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix)
    streamed = list(stream_prompts([PromptSource(path=str(path), **COLUMNS)], "benign"))
    assert streamed == read_prompts([PromptSource(path=path, **COLUMNS)], "benign")
    assert [prompt.text for prompt in streamed] == ["how to boil an egg", "how to  boil\u2028an egg?\n\nhard", "NA"]
    assert [prompt.answer for prompt in streamed] == ["Put it in water.", None, "null"]


def test_patterns_are_read_in_order_and_repeats_dropped_over_all_sources(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"prompt": f"prompt {number} {index}"} for index in range(4)] + [{"prompt": "the same"}]
        (tmp_path / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(path=str(tmp_path / "part-*.jsonl"))
    found = texts(source, source)
    assert found == [
        "prompt 0 0", "prompt 0 1", "prompt 0 2", "prompt 0 3", "the same",
        *(f"prompt {number} {index}" for number in (1, 2) for index in range(4)),
    ]  # fmt: skip


def test_a_limit_draws_over_the_whole_source_and_keeps_its_order(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", [{"goal": f"prompt {index:03d}"} for index in range(200)])
    source = PromptSource(path=str(path), prompt="goal", limit=20)
    found = texts(source)
    assert found == texts(source) == sorted(set(found))
    assert len(found) == 20
    assert found != texts(source, seed=1)
    assert any(text > "prompt 100" for text in found)
    assert texts(source.model_copy(update={"limit": 500})) == [f"prompt {index:03d}" for index in range(200)]


def test_a_stream_is_not_read_ahead(tmp_path: Path) -> None:
    """The second source is missing, and nobody asks for it."""
    path = write(tmp_path, ".jsonl")
    stream = stream_prompts([PromptSource(path=str(path), **COLUMNS), PromptSource(path="missing.csv")], "benign")
    assert next(stream).text == "how to boil an egg"


def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": ')
    (tmp_path / "prompts.txt").write_text("x")
    good = write(tmp_path, ".jsonl")
    for source, words in (
        (PromptSource(path=str(tmp_path / "missing-*.csv")), "does not exist"),
        (PromptSource(path=str(tmp_path / "prompts.txt")), "ends in '.txt'"),
        (PromptSource(path=str(tmp_path / "broken.jsonl")), "cannot be read"),
        (PromptSource(path=str(good), prompt="nothing"), "no column 'nothing'"),
        (PromptSource(path=str(good), prompt="goal", where={"safe": "maybe"}), "no prompts with"),
    ):
        with pytest.raises(DataError, match=words):
            texts(source)
