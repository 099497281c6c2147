"""Everything finished reaches the storage whole, and nothing half-sent ever counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import write_text
from raycomplete.storage import integrity
from raycomplete.storage import mirror as mirror_module
from raycomplete.storage.mirror import FILES, Manifest, Mirror, StoredFile, decode, encode, restore
from raycomplete.storage.remote import Remote
from tests.storage.conftest import BrokenRemote
from tests.storage.folders import add_checkpoint, add_rows, make_run, results
from tests.storage.test_integrity import flip


def mirror_of(remote: Remote, run: Path, said: list[str] | None = None, *, keep: int = 2) -> Mirror:
    warn = (said if said is not None else []).append
    return Mirror(remote, run, keep=keep, warn=warn, interval_s=0.05)


def fetched(remote: Remote, run: Path, said: list[str] | None = None) -> list[str]:
    return restore(remote, run, hashed=True, warn=(said if said is not None else []).append)


def test_a_lost_run_folder_comes_back_as_it_was(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 4)
    add_checkpoint(run, 3, kind="best")
    add_checkpoint(run, 6).joinpath(integrity.COMPLETE).unlink()  # still being written
    write_text(run / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n{"st')  # likewise
    mirror_of(remote, run).look()
    names = fetched(remote, tmp_path / "new")
    assert {"checkpoints/step-000004", "best/step-000003", "samples.jsonl", "evaluation/base.json"} <= {*names}
    before, after = results(run), results(tmp_path / "new")
    assert after.pop("metrics.jsonl")[1] == b'{"step": 1}\n{"step": 2}\n'
    wanted = {name for name in before if not name.startswith(("checkpoints/step-000002", "checkpoints/step-000006"))}
    assert after == {name: before[name] for name in wanted - {"metrics.jsonl"}}
    assert after["samples.jsonl"][0] == 0o600
    assert fetched(remote, tmp_path / "new") == []


def test_a_finished_student_is_enough(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    write_text(run / "student" / "model.safetensors", "weights")
    write_text(run / "student" / "config.json", "{}")
    mirror_of(remote, run).look()
    assert "student" in fetched(remote, tmp_path / "new")
    assert not (tmp_path / "new" / "checkpoints").exists()
    assert (tmp_path / "new" / "student" / "model.safetensors").read_text() == "weights"


def test_retention_holds_in_the_storage_too(remote: Remote, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    mirror = mirror_of(remote, run, keep=2)
    for step in (1, 2, 3):
        add_checkpoint(run, step)
        add_checkpoint(run, step, kind="best")
        if step > 1:
            integrity.drop(run / "best" / f"step-{step - 1:06d}")
        add_rows(run, step)
        mirror.look()
    assert sorted(Manifest(remote).pieces) == [
        "best/step-000003",
        "checkpoints/step-000002",
        "checkpoints/step-000003",
        "files",
    ]
    assert {path.split("/")[1] for path in remote.sizes("checkpoints")} == {"step-000002", "step-000003"}
    versions = [path for path in remote.sizes("files") if path.endswith("metrics.jsonl")]
    assert len(versions) == 1, "the newest only"


def test_an_upload_that_was_killed_does_not_count_and_is_swept_away(tmp_path: Path) -> None:
    uri, run = f"file://{tmp_path}/storage", make_run(tmp_path / "run", 2, 4)
    mirror_of(BrokenRemote(uri, "manifests/00000003"), run).look()  # all but the manifest arrived
    remote = Remote(uri)
    assert "checkpoints/step-000004/latest" in remote.sizes("checkpoints")
    assert "checkpoints/step-000002" in fetched(remote, tmp_path / "new")
    assert not (tmp_path / "new" / "checkpoints" / "step-000004").exists()
    integrity.drop(run / "checkpoints" / "step-000004")
    mirror_of(remote, run).look()
    assert {path.split("/")[1] for path in remote.sizes("checkpoints")} == {"step-000002"}


def test_a_failing_upload_is_told_at_once_and_tried_again(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "run", 2), list[str]()
    remote = BrokenRemote(f"file://{tmp_path}/storage", "rank_1.pt", failures=1)
    mirror = mirror_of(remote, run, said)
    mirror.start()
    mirror.close(timeout_s=60)
    assert len(said) == 1
    assert "checkpoints/step-000002 cannot be mirrored" in said[0]
    assert "the line is cut" in said[0]
    assert fetched(remote, tmp_path / "new")


def test_what_is_missing_at_the_end_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    mirror = mirror_of(BrokenRemote(f"file://{tmp_path}/storage", "step-000002"), run)
    mirror.start()
    with pytest.raises(WorkError, match=r"Not mirrored to file://.*: checkpoints/step-000002: the line is cut\."):
        mirror.close(timeout_s=2)


def test_a_large_file_that_grows_is_sent_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    remote, run = Remote(f"file://{tmp_path}/storage"), make_run(tmp_path / "run", 2)
    log, metrics = run / "logs" / "driver.jsonl", run / "metrics.jsonl"
    write_text(log, "{}\n" * 10**6)
    mirror = mirror_of(remote, run)

    def sizes() -> list[int]:
        files = Manifest(remote).pieces[FILES]
        return [files[path.relative_to(run).as_posix()].size for path in (log, metrics)]

    mirror.look()
    first = sizes()
    for path in (log, metrics):
        write_text(path, path.read_text() + "{}\n")
    mirror.look()
    assert sizes() == [first[0], first[1] + 3], "metrics come with every checkpoint"
    mirror.start()
    mirror.close(timeout_s=60)
    assert sizes() == [first[0] + 3, first[1] + 3]


def test_of_two_processes_one_mirrors(tmp_path: Path) -> None:
    """An evaluation beside a training: two writers would remove each other's files."""
    remote, run = Remote(f"file://{tmp_path}/storage"), make_run(tmp_path / "run", 2)
    first, second = (mirror_of(BrokenRemote(remote.uri, bad), run) for bad in ("nothing", "manifests"))
    first.start()
    deadline = time.monotonic() + 60
    while "files" not in Manifest(remote).pieces:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.start()
    second.close(timeout_s=60)  # it would have failed, had it tried
    write_text(run / "summary.json", "{}")
    first.close(timeout_s=60)
    assert "summary.json" in Manifest(remote).pieces[FILES]


def test_a_checkpoint_that_its_disk_damaged_is_not_mirrored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 4)
    flip(run / "checkpoints" / "step-000004" / "latest")
    mirror = mirror_of(Remote(f"file://{tmp_path}/storage"), run)
    mirror.look()
    assert "damaged on its disk" in mirror.missing["checkpoints/step-000004"]
    assert "checkpoints/step-000002" in fetched(Remote(f"file://{tmp_path}/storage"), tmp_path / "new")


def test_a_manifest_that_was_cut_off_or_points_outside_counts_for_nothing() -> None:
    stored = StoredFile(1, "00", 0o600, "student/a")
    whole = {"student": {"a": stored}}
    assert decode(encode(whole)) == whole
    assert decode(encode(whole)[:-9]) is None
    assert decode(encode(whole).replace(b"384", b"420")) is None
    for outside in ("../a", "/etc/passwd", "a/../../b"):
        assert decode(encode({"student": {outside: stored}})) is None
    assert decode(encode({"../student": {"a": stored}})) is None


@pytest.mark.parametrize("has_links", [True, False])
def test_a_checkpoint_that_is_removed_while_it_is_read_never_counts(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, run = Remote(f"file://{tmp_path}/storage"), make_run(tmp_path / "run", 2)
    linked = mirror_module._linked

    def overtaken(source: Path, stage: Path) -> Path:
        for name in (integrity.COMPLETE, "latest"):  # retention of the trainer, half-way
            (source / name).unlink()
        return linked(source, stage) if has_links else source

    monkeypatch.setattr(mirror_module, "_linked", overtaken)
    mirror = mirror_of(remote, run)
    mirror.look()
    assert [*Manifest(remote).pieces] == ["files"]
    assert mirror.missing == {}
