"""`raycomplete push` against a hub of this machine, which speaks the routes that huggingface_hub calls."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from raycomplete.commands.push import push
from raycomplete.data.organisms import ORGANISMS
from raycomplete.runtime.errors import ConfigError, DataError
from tests.report.conftest import fill_run_folder

TOKEN = "hf_secretsecret"


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; `private` is what it says of its repositories."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.private, self.refuses = True, False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer({"id": "org/name", "private": self.server.private, "tags": [], "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.refuses:
            self.answer({"error": f"{TOKEN} has no right"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/org/name", "name": "org/name"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [item["path"] for item in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/org/name/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"error": f"no route {self.path}"}, 404)

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = fill_run_folder(tmp_path)
    student = folder / "student"
    student.mkdir()
    for path in ORGANISMS["organism"].checkpoint("aligned").iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    (student / "notes.bin").write_bytes(b"not for others")
    return folder


def command(run: Path, hub: Hub, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its environment once."""
    names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(run / "hf"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "raycomplete", "push", str(run), "org/name", *flags],
        env={**kept, **place, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_yes_everything_is_listed_and_nothing_asked(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = push(run, "org/name")
    said = capfd.readouterr().out
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        assert path.name in said
    assert "notes.bin" in said
    assert "model-index" in said
    assert "Nothing was uploaded" in said


def test_with_yes_the_student_goes_to_a_private_repository(run: Path, hub: Hub) -> None:
    done = command(run, hub, "--yes", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "private" in (hub.created[0].get("visibility"), *(["private"] if hub.created[0].get("private") else []))
    assert hub.tokens == {f"Bearer {TOKEN}"}
    student = run / "student"
    assert hub.files["model.safetensors"] == (student / "model.safetensors").read_bytes()
    assert hub.files["README.md"] == (student / "README.md").read_bytes()
    assert set(hub.files) == {path.name for path in student.iterdir()} - {"notes.bin"}
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "refuses", "private", "code"),
    [
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, False, True, 2),
        ({}, False, True, 2),  # no token
        ({"HF_TOKEN": TOKEN}, False, False, 2),  # a public repository without --public
        ({"HF_TOKEN": TOKEN}, True, True, 1),
    ],
)
def test_failures_upload_nothing_and_show_no_token(
    environment: dict[str, str], refuses: bool, private: bool, code: int, run: Path, hub: Hub
) -> None:
    hub.refuses, hub.private = refuses, private
    done = command(run, hub, "--yes", **environment)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("Failed: " if code == 1 else "Refused: ")
    assert TOKEN not in done.stdout + done.stderr
    assert hub.files == {}


def test_names_are_uploaded_and_no_folder_below(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A star of the hub's patterns crosses folders: what is not listed must not go with the rest."""
    (run / "student" / "old").mkdir()
    (run / "student" / "old" / "trials.json").write_text("{}")
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "address")
    monkeypatch.setattr(HfApi, "repo_info", lambda *_: SimpleNamespace(private=True))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: asked.update(options))
    listed = push(run, "org/name", yes=True)
    below = [path.relative_to(run / "student").as_posix() for path in (run / "student").rglob("*") if path.is_file()]
    sent = filter_repo_objects(below, allow_patterns=asked["allow_patterns"])
    assert sorted(sent) == sorted(path.name for path in listed)


def test_what_cannot_be_pushed_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("name", "org/name/more", "org/", "../name"):
        with pytest.raises(ConfigError):
            push(run, name)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"evaluation": {"defence": {"name": "probe"}}}))
    with pytest.raises(DataError, match="probe"):
        push(run, "org/name")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError):
        push(fill_run_folder(tmp_path / "other"), "org/name")
