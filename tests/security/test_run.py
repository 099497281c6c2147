"""Ray as a run starts it: who may come in, what is open to the network, and what secrets it leaves on disk."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SECRETS = "RAYCOMPLETE_TOKEN HF_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN WANDB_API_KEY".split()


def test_a_run_is_closed_to_strangers_and_leaves_no_secret() -> None:
    canaries = {name: f"canary-{secrets.token_hex(12)}" for name in SECRETS}
    # Ray's sockets lie in its folder, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as short:
        folder = Path(short)
        (folder / "ray").mkdir()
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_NUM_THREADS"))}
        ours |= canaries | {"PYTHONPATH": str(ROOT), "HOME": short, "RAY_TMPDIR": str(folder / "ray")}
        command = [sys.executable, "-m", "tests.security.small_run", short]
        done = subprocess.run(command, cwd=folder, env=ours, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(done.stdout.splitlines()[-1])

        assert said["auth_mode"] == "token", "as Ray does unless it is told otherwise"
        assert said["stranger"].startswith("kept out"), said["stranger"]
        token = folder / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600

        # Beyond loopback only Ray's traffic between nodes listens, which asks for the token, and its metrics.
        listening = said["listening"]
        assert any("gcs_server" in entry["process"] for entry in listening), "the sockets of Ray itself were looked at"
        dashboards = [entry for entry in listening if "dashboard.py" in entry["process"] or entry["port"] == 8265]
        assert [entry for entry in dashboards if not ipaddress.ip_address(entry["host"]).is_loopback] == []

        files = [path for path in folder.rglob("*") if path.is_file() and path.name != "auth_token"]
        names = {path.name for path in files}
        assert {"config.yaml", "environment.json", "raylet.out", "gcs_server.out"} <= names, "logs and run folder"
        content = {path: path.read_bytes() for path in files} | {Path("console"): (done.stdout + done.stderr).encode()}
        hidden = {**canaries, "Ray's token": token.read_text().strip()}
        assert [
            f"{name} in {path}"
            for name, canary in hidden.items()
            for path, text in content.items()
            if canary.encode() in text and (name in canaries or path != Path("console"))
        ] == []
