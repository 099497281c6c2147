"""Ports and tokens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor import network
from raycomplete.doctor.findings import Context
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"


def context(*overrides: str) -> Context:
    return Context(RUN_FILE, load_run_file(RUN_FILE, overrides))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAYCOMPLETE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_port_in_use_names_its_user() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = network.check_ports(context(f"serve.port={port}"))
        assert finding.status == "warn"
        assert f"{port} (raycomplete serve) is used by " in finding.found
        assert "choose another serve.port" in finding.remedy.lower()
    assert network.port_user(port) is None


def test_rays_token_must_be_private_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = context("cluster.address=head:6379")
    assert network.check_ray_token(context()).status == "ok", "made when a local cluster starts"
    assert "neither RAY_AUTH_MODE nor a token" in network.check_ray_token(cluster).found
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert network.check_ray_token(cluster).status == "fail", "a cluster cannot be entered without"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    assert network.check_ray_token(context()).status == "warn"
    assert network.check_ray_token(cluster).remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    assert network.check_ray_token(cluster).status == "ok"
    assert "0" * 64 not in str(network.check_ray_token(cluster)), "the token itself is never shown"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert network.check_ray_token(cluster).status == "ok", "Ray uses a token that it finds"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert network.check_ray_token(context()).status == "fail"


def test_the_service_beyond_this_machine_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.check_service_token(context()).status == "ok"
    finding = network.check_service_token(context("serve.host=0.0.0.0"))
    assert finding.status == "fail"
    assert "RAYCOMPLETE_TOKEN" in finding.remedy
    (tmp_path / "token").write_text("t" * 32)
    (tmp_path / "token").chmod(0o640)
    with_file = context("serve.host=0.0.0.0", f"serve.token_file={tmp_path / 'token'}")
    assert network.check_service_token(with_file).remedy.startswith("chmod 600")
    (tmp_path / "token").chmod(0o600)
    assert network.check_service_token(with_file).status == "ok"
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "s" * 32)
    assert "s" * 32 not in str(network.check_service_token(context("serve.host=0.0.0.0")))
