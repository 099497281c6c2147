"""Ray as a run starts it: who may come in, what is open to the network, and what secrets it leaves on disk."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SECRETS = (
    "RAYCOMPLETE_TOKEN",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "WANDB_API_KEY",
)


@dataclass(frozen=True)
class Run:
    """The output of a small run, where it wrote, and the secrets that were in its environment."""

    said: dict[str, Any]
    folder: Path
    canaries: dict[str, str]
    console: str


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    canaries = {name: f"canary-{secrets.token_hex(12)}" for name in SECRETS}
    # Ray's sockets lie in its folder, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as short:
        folder = Path(short)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"
        }
        environment |= canaries | {"PYTHONPATH": str(ROOT), "HOME": short, "RAY_TMPDIR": str(folder / "ray")}
        (folder / "ray").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "tests.security.small_run", short],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        yield Run(json.loads(done.stdout.splitlines()[-1]), folder, canaries, done.stdout + done.stderr)


def test_ray_asks_for_its_token(run: Run) -> None:
    assert run.said["auth_mode"] == "token", "as Ray does unless it is told otherwise"
    assert run.said["stranger"].startswith("kept out"), run.said["stranger"]


def test_the_token_is_for_its_owner_only(run: Run) -> None:
    token = run.folder / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600


def test_no_dashboard_and_no_page_is_open_to_the_network(run: Run) -> None:
    """All that listens beyond loopback is Ray's traffic between nodes, which asks for the token, and its metrics."""
    listening = run.said["listening"]
    assert any("gcs_server" in entry["process"] for entry in listening), "the sockets of Ray itself were looked at"
    dashboards = [entry for entry in listening if "dashboard.py" in entry["process"] or entry["port"] == 8265]
    assert [entry for entry in dashboards if not ipaddress.ip_address(entry["host"]).is_loopback] == []


def test_no_secret_is_in_a_log_or_a_run_folder(run: Run) -> None:
    ray_token = (run.folder / ".ray" / "auth_token").read_text().strip()
    canaries = {**run.canaries, "Ray's token": ray_token}
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.name != "auth_token"]
    names = {path.name for path in files}
    assert {"config.yaml", "environment.json", "raylet.out", "gcs_server.out"} <= names, "logs and run folder are there"
    content = {path: path.read_bytes() for path in files}
    found = [
        f"{name} in {path}"
        for name, canary in canaries.items()
        for path, text in content.items()
        if canary.encode() in text
    ]
    assert found == []
    assert [name for name, canary in canaries.items() if canary in run.console] == []
