"""Whole checkpoints are told from damaged ones, and retention ends no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomplete.runtime.errors import WorkError
from raycomplete.storage import integrity
from tests.storage.folders import add_checkpoint


def flip(path: Path) -> None:
    """Changes one byte and not the size."""
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    checkpoint = add_checkpoint(tmp_path, 3)
    assert integrity.damage(checkpoint) is None
    flip(checkpoint / "state" / "rank_1.pt")
    assert integrity.damage(checkpoint) == "state/rank_1.pt has another sha256"
    assert integrity.damage(checkpoint, hashed=False) is None, "sizes alone do not tell"
    (checkpoint / "state" / "rank_1.pt").write_text("short")
    assert integrity.damage(checkpoint, hashed=False) == "state/rank_1.pt holds 5 bytes instead of 22"
    (checkpoint / "state" / "rank_1.pt").unlink()
    assert integrity.damage(checkpoint) == "state/rank_1.pt is missing"
    (checkpoint / integrity.COMPLETE).write_text("{")
    assert integrity.damage(checkpoint) == "it cannot be read (JSONDecodeError)"
    (checkpoint / integrity.COMPLETE).unlink()
    assert integrity.damage(checkpoint) == "it was never finished"


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_no_longer_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        add_checkpoint(tmp_path, step)
    folder, said = tmp_path / "checkpoints", []
    flip(folder / "step-000003" / "latest")
    found = integrity.newest_whole(folder, warn=said.append)
    assert found == folder / "step-000002"
    assert len(said) == 1
    assert "step-000003 is damaged (latest has another sha256)" in said[0]
    assert [path.name for path in integrity.complete_checkpoints(folder)] == ["step-000001", "step-000002"]
    add_checkpoint(tmp_path, 3)  # written again on the way
    assert integrity.newest_whole(folder, warn=said.append) == folder / "step-000003"


def test_none_is_an_error_only_where_there_should_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert integrity.newest_whole(folder) is None
    for step in (1, 2):
        flip(add_checkpoint(tmp_path, step) / "latest")
    for _ in range(2):  # and it stays one
        with pytest.raises(WorkError, match=r"No checkpoint in .* is whole \(step-000002: latest has .*--overwrite"):
            integrity.newest_whole(folder)


@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"),
    [(2, 0, [1, 2, 4]), (1, 2, [1, 5]), (9, 0, []), (1, 5, [1, 2, 4])],
)
def test_retention(keep: int, keep_every: int, gone: list[int], tmp_path: Path) -> None:
    steps = [1, 2, 4, 5, 6]
    assert integrity.superseded(steps, keep, keep_every) == gone
    for step in steps:
        add_checkpoint(tmp_path, step)
    integrity.prune(tmp_path / "checkpoints", keep, keep_every)
    left = [integrity.step_of(path) for path in integrity.complete_checkpoints(tmp_path / "checkpoints")]
    assert left == [step for step in steps if step not in gone]


def test_only_what_is_half_written_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    integrity.drop_unfinished(folder)  # not there yet
    for step in (1, 2, 3):
        add_checkpoint(tmp_path, step)
    (folder / "step-000002" / integrity.COMPLETE).unlink()
    (folder / "notes.txt").write_text("the user's")
    integrity.drop_unfinished(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step-000001", "step-000003"]
