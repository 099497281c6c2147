"""Atomic writes: whole or absent, private from the first byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raycomplete.runtime import files


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
