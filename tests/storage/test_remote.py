"""A storage that cannot be used is refused in one sentence, before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raycomplete.runtime.errors import SetupError
from raycomplete.storage.remote import Remote, connect
from tests.storage.conftest import http, s3_uri


def test_files_come_and_go(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    remote.upload(tmp_path / "source", "a/b/file")
    assert remote.sizes("a") == {"a/b/file": 100}
    remote.download("a/b/file", tmp_path / "target", 0o640)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "target").read_bytes() == b"x" * 100
    with pytest.raises(FileNotFoundError):
        remote.read("a/nothing")
    remote.delete("a/nothing")
    remote.delete("a/b/file")
    assert remote.sizes("a") == {}
    assert remote.sizes("nothing") == {}


def test_a_probe_leaves_nothing_behind(uri: str) -> None:
    assert connect(uri).sizes("") == {}


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        SetupError, match=r"The storage file://.*/file/run cannot be used \(.*\)\. Check output\.storage"
    ):
        connect(f"file://{tmp_path}/file/run")


@pytest.mark.slow
def test_s3_says_what_is_wrong(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"NO_SUCH_BUCKET.* Create the bucket, or correct output\.storage\.$"):
        connect(s3_uri(s3_server, "runs", bucket="missing"))
    with pytest.raises(SetupError, match=r"The storage s3://bucket/runs (cannot be used|did not answer)"):
        connect(s3_uri("127.0.0.1:9", "runs"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    assert connect("s3://bucket/by-environment?region=us-east-1").sizes("") == {}
    http(f"http://{s3_server}/moto-api/reset-auth", "POST", b"0")  # from here on keys are looked at
    try:
        with pytest.raises(SetupError, match=r"Set credentials that may read, write and delete there") as caught:
            connect(s3_uri(s3_server, "runs"))
    finally:
        http(f"http://{s3_server}/moto-api/reset-auth", "POST", b"inf")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_files_on_a_mount_are_as_private_as_here(tmp_path: Path) -> None:
    """A mount may have other users, and what is mirrored holds answers to harmful prompts."""
    source = tmp_path / "samples.jsonl"
    source.write_text("tokens")
    source.chmod(0o600)
    remote = Remote(f"file://{tmp_path}/store")
    remote.upload(source, "run/samples.jsonl")
    remote.write("run/manifest.json", b"{}")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "store" / "run").iterdir()}
    assert modes == {"samples.jsonl": 0o600, "manifest.json": 0o600}
