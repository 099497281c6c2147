"""Atomic writes: whole or absent, private from the first byte; and rows that survive a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raycomplete.runtime import files
from raycomplete.runtime.files import RowStore, content_hash


def test_json_round_trip_and_folders_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "content.json"
    files.write_json(path, {"name": "\u00fc", "values": [1, None]})
    assert files.read_json(path) == {"name": "\u00fc", "values": [1, None]}
    assert [item.name for item in path.parent.iterdir()] == ["content.json"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "content.json"
    files.write_json(path, {"old": True})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"rate": float("nan")})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"new": True})
    assert files.read_json(path) == {"old": True}
    assert [item.name for item in tmp_path.iterdir()] == ["content.json"]


def test_private_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.write_text(tmp_path / "secret", "harmful", mode=files.PRIVATE)
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_an_unreadable_mapping_counts_as_absent(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content, encoding="latin-1")
    assert files.read_json(tmp_path / "file") is None


def test_rows_survive(tmp_path: Path) -> None:
    path = tmp_path / "a" / "rows.jsonl"
    store = RowStore(path, mode=0o600)
    assert not path.exists(), "nothing is written before there is something to say"
    store.add([{"key": "x", "value": 1}, {"key": "y", "value": 2}])
    store.add([{"key": "x", "value": 3}])
    assert path.stat().st_mode & 0o777 == 0o600
    again = RowStore(path)
    assert (again["x"]["value"], again["y"]["value"]) == (1, 2)
    assert "z" not in again
    assert again.get("z") == {}


def test_whatever_a_killed_process_leaves_is_repaired(tmp_path: Path) -> None:
    """Cut after every byte: whole lines are kept, the torn one is dropped, and what is added later can be read."""
    path = tmp_path / "rows.jsonl"
    RowStore(path).add({"key": key, "value": key * 3} for key in "ab")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        store = RowStore(path)
        kept = [key for key in "ab" if key in store]
        assert kept == list("ab")[: whole[:cut].count(b"}")]
        store.add([{"key": "c", "value": "new"}])
        assert [key for key in "abc" if key in RowStore(path)] == [*kept, "c"]


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = RowStore(path), RowStore(path)
    first.add([{"key": "a"}])
    second.add([{"key": "b"}])
    first.add([{"key": "c"}])
    assert all(key in RowStore(path) for key in "abc")


def test_hash_names_content() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
