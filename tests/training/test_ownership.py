"""Who may have written the pickles that a resumed run loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from raycomplete.runtime.errors import CheckpointError
from raycomplete.training import deepspeed_engine as engine
from raycomplete.training.ownership import check_owned, make_private


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    make_private(folder)
    (folder / "step-000001" / "state").mkdir(parents=True)
    (folder / "step-000001" / "state" / "rank0.pt").write_bytes(b"x")
    (folder / "step-000001" / "complete.json").write_text('{"step": 1, "world_size": 1}')
    return folder


def test_what_a_run_wrote_itself_is_loaded(checkpoints: Path) -> None:
    check_owned(checkpoints)
    (checkpoints / "step-000001" / "state").chmod(0o775)  # as under a umask of 002; nobody else gets that far
    check_owned(checkpoints)


@pytest.mark.parametrize("mode", [0o770, 0o707])
@pytest.mark.parametrize("place", [".", "step-000001", "step-000001/state/rank0.pt"])
def test_what_others_may_write_is_refused(place: str, mode: int, checkpoints: Path) -> None:
    checkpoints.chmod(0o755)
    (checkpoints / place).chmod(mode)
    with pytest.raises(CheckpointError, match=r"can run code, and other users may write.*chmod -R go-w"):
        check_owned(checkpoints)


def test_links_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "planted.pt").write_bytes(b"x")
    (checkpoints / "step-000001" / "state" / "rank1.pt").symlink_to(tmp_path / "planted.pt")
    with pytest.raises(CheckpointError, match=r"rank1\.pt is a link"):
        check_owned(checkpoints)


def test_files_of_another_user_are_refused(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if checkpoints.stat().st_uid == 0:  # the tests run as root, whose files anybody may trust
        os.chown(checkpoints / "step-000001", 54321, -1)
    with pytest.raises(CheckpointError, match=r"belongs to user \d+ and this process to 12345"):
        check_owned(checkpoints)
    monkeypatch.setenv("RAYCOMPLETE_TRUST_CHECKPOINTS", "1")
    check_owned(checkpoints)


def test_a_restore_asks_first(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a single pickle is opened: the engine would fail this test if it were asked."""

    class Untouched:
        def __getattr__(self, name: str) -> Any:
            pytest.fail(f"engine.{name} was asked for")

    monkeypatch.setattr(engine, "_agreed", lambda decide: decide())  # one process, no process group
    checkpoints.chmod(0o777)
    with pytest.raises(CheckpointError, match="other users may write"):
        engine.restore(Untouched(), checkpoints)


def test_a_folder_that_was_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o777)
    make_private(tmp_path / "old")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o700
