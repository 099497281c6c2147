"""Restoring: never a half of anything, and damage in the storage costs no more than the piece it hit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from raycomplete.runtime.errors import WorkError
from raycomplete.storage import integrity
from raycomplete.storage.mirror import FILES, Manifest
from raycomplete.storage.remote import Remote
from tests.storage.folders import add_checkpoint, add_rows, content, make_run
from tests.storage.test_integrity import flip
from tests.storage.test_mirror import fetched, mirror_of


def damaged(remote: Remote, path: str) -> None:
    """Changes an object behind the manifest's back, and not its size."""
    before = remote.read(path)
    remote.write(path, bytes([before[0] ^ 1]) + before[1:])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(remote: Remote, tmp_path: Path) -> None:
    mirror_of(remote, make_run(tmp_path / "run", 2, 4)).look()
    damaged(remote, "checkpoints/step-000004/state/rank_0.pt")
    said: list[str] = []
    assert "checkpoints/step-000002" in fetched(remote, tmp_path / "new", said)
    assert len(said) == 1
    assert "checkpoints/step-000004" in said[0]
    assert "another sha256" in said[0]
    assert [path.name for path in (tmp_path / "new" / "checkpoints").iterdir()] == ["step-000002"]
    assert "checkpoints/step-000004" not in Manifest(remote).pieces, "it no longer takes a place of retention"


def test_no_whole_checkpoint_is_a_clear_error(remote: Remote, tmp_path: Path) -> None:
    mirror_of(remote, make_run(tmp_path / "run", 2)).look()
    remote.delete("checkpoints/step-000002/latest")
    with pytest.raises(WorkError, match=r"No checkpoint in .* is whole \(checkpoints/step-000002\).*--overwrite"):
        fetched(remote, tmp_path / "new")


def test_a_damaged_file_is_left_out_and_one_that_is_needed_is_an_error(remote: Remote, tmp_path: Path) -> None:
    mirror_of(remote, make_run(tmp_path / "run", 2)).look()
    files, said = Manifest(remote).pieces[FILES], list[str]()
    damaged(remote, files["metrics.jsonl"].path)
    assert "metrics.jsonl" not in fetched(remote, tmp_path / "new", said)
    assert not (tmp_path / "new" / "metrics.jsonl").exists()
    assert "metrics.jsonl" in said[0]
    damaged(remote, files["samples.jsonl"].path)
    with pytest.raises(WorkError, match=r"samples\.jsonl in .* is damaged, and the run cannot go on without it"):
        fetched(remote, tmp_path / "newer")


def test_a_manifest_that_was_torn_gives_way_to_the_one_before(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    mirror_of(remote, run).look()
    before = {path: remote.read(path) for path in remote.sizes("manifests")}
    add_checkpoint(run, 4)
    mirror_of(remote, run).look()
    newest = max(remote.sizes("manifests"))
    remote.write(newest, remote.read(newest)[:-9])
    fetched(remote, tmp_path / "new")
    assert (tmp_path / "new" / "checkpoints" / "step-000002").is_dir()
    assert not (tmp_path / "new" / "checkpoints" / "step-000004").exists()
    mirror_of(remote, run).look()
    assert max(remote.sizes("manifests")) > newest
    assert Manifest(remote).steps("checkpoints") == [2, 4]
    for path in {*remote.sizes("manifests"), *before}:
        remote.write(path, b"{")
    with pytest.raises(WorkError, match=r"No manifest in .* can be read\..*--overwrite"):
        fetched(remote, tmp_path / "newer")


def test_a_run_that_went_on_elsewhere_is_caught_up_with(remote: Remote, tmp_path: Path) -> None:
    here, there = make_run(tmp_path / "here", 2), make_run(tmp_path / "there", 2, 4)
    mirror_of(remote, there).look()
    (there / "evaluation" / "base.json").write_text("newer")
    mirror_of(remote, there).look()
    assert {"checkpoints/step-000004", "metrics.jsonl", "evaluation/base.json"} <= {*fetched(remote, here)}
    assert integrity.newest_whole(here / "checkpoints") == here / "checkpoints" / "step-000004"
    assert (here / "evaluation" / "base.json").read_text() == "newer"


def test_a_run_that_is_ahead_keeps_what_it_has(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    mirror_of(remote, run).look()
    add_checkpoint(run, 4)
    add_rows(run, 4)
    (run / "evaluation" / "base.json").write_text("newer")
    before = content(run)
    assert fetched(remote, run) == []
    assert content(run) == before


def test_a_damaged_local_checkpoint_is_fetched_anew(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 4)
    mirror_of(remote, run).look()
    flip(run / "checkpoints" / "step-000004" / "latest")
    assert fetched(remote, run) == ["checkpoints/step-000004"]
    assert integrity.damage(run / "checkpoints" / "step-000004") is None


def test_a_restore_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, run = Remote(f"file://{tmp_path}/storage"), make_run(tmp_path / "run", 2, 4)
    mirror_of(remote, run).look()
    download = Remote.download

    def full_disk(self: Remote, path: str, target: Path, mode: int) -> None:
        if path.endswith("rank_1.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        download(self, path, target, mode)

    monkeypatch.setattr(Remote, "download", full_disk)
    with pytest.raises(WorkError, match=r"The disk of .* is full; .* Free space"):
        fetched(remote, tmp_path / "new")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == [], "no half of a checkpoint"
    monkeypatch.setattr(Remote, "download", download)
    assert fetched(remote, tmp_path / "new") == ["checkpoints/step-000004"]


def test_an_empty_storage_and_somebody_elses_folder_are_left_alone(remote: Remote, tmp_path: Path) -> None:
    assert fetched(remote, tmp_path / "new") == []
    mirror_of(remote, make_run(tmp_path / "run", 2)).look()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert fetched(remote, tmp_path / "thesis") == []
    assert [*content(tmp_path / "thesis")] == ["thesis.tex"]
