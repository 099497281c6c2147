"""Ports and tokens; nodes with told answers for what is wrong, and a real cluster for what works."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor import network
from raycomplete.doctor.findings import ChildReport, Context
from raycomplete.doctor.probes import look
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"
HERE = look("", "", [])["versions"]
CHECKS = (network.check_cluster, network.check_node_versions, network.check_clocks, network.check_shared_storage)


def context(*overrides: str) -> Context:
    return Context(RUN_FILE, load_run_file(RUN_FILE, overrides))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAYCOMPLETE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("plain")
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


@pytest.mark.usefixtures("plain")
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


@pytest.mark.usefixtures("plain")
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


def node(host: str, **other: Any) -> dict[str, Any]:
    plain = {"host": host, "sees_probe": True, "missing": [], "versions": HERE, "rtt_s": 0.01, "skew_s": 0.001}
    return plain | other


def told(*found: dict[str, Any], alive: int | None = None, code: int | None = 0) -> Context:
    answered = context("cluster.address=head:6379")
    report = {"alive": alive or len(found), "resources": {"CPU": 8.0}}
    messages = [report, {"nodes": list(found), "errors": []}] if code == 0 else []
    answered.once("cluster", lambda: ChildReport(messages, code, "", 120.0))
    return answered


def test_one_machine_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for check in (
        network.check_cluster,
        network.check_node_versions,
        network.check_clocks,
        network.check_shared_storage,
    ):
        finding = check(context())
        assert (finding.status, finding.found.split(":")[0]) == ("ok", "One machine and no cluster")


def test_a_cluster_that_does_not_answer_is_a_failure() -> None:
    silent = told(code=None)
    assert "No Ray cluster answers at head:6379 (no answer within 120 s)" in network.check_cluster(silent).found
    assert network.check_clocks(silent).status == "warn"
    assert "1 of them ran no task" in network.check_cluster(told(node("a"), alive=2)).found


def test_a_cluster_that_is_too_small_fails_unless_the_run_waits_for_nodes() -> None:
    for wait_s, status in ((10, "fail"), (900, "warn")):
        asked = context("cluster.address=head:6379", "cluster.cpus_per_worker=10", f"cluster.wait_for_nodes_s={wait_s}")
        asked.once("cluster", lambda: ChildReport([{"alive": 1, "resources": {"CPU": 8.0}}, {"nodes": [node("a")]}]))
        finding = network.check_cluster(asked)
        assert (finding.status, "the run needs 11.5 CPU" in finding.found) == (status, True)


def test_each_difference_between_nodes_is_found() -> None:
    good = node("a")
    late = network.check_clocks(told(good, node("b", skew_s=-7.5)))
    assert (late.status, "-7.500 s (b)" in late.found) == ("fail", True)
    assert network.check_clocks(told(good, node("b", skew_s=4.9))).status == "ok"
    blind = network.check_shared_storage(told(good, node("b", sees_probe=False)))
    assert (blind.status, blind.found.startswith("b cannot read ")) == ("fail", True)
    missing = network.check_shared_storage(told(good, node("b", missing=["/models/x"])))
    assert missing.found == "b lacks /models/x."
    other = network.check_node_versions(told(good, node("b", versions=HERE | {"ray": "2.59.0"})))
    assert (other.status, f"b has ray 2.59.0 (here {HERE['ray']})" in other.found) == ("fail", True)
    assert all(finding.remedy for finding in (late, blind, missing, other))


@pytest.mark.slow
def test_a_real_cluster_passes_and_nothing_is_left_behind(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    address = ray.get_runtime_context().gcs_address
    real = context(f"cluster.address={address}", f"output.root={tmp_path / 'deep' / 'runs'}")
    for check in (
        network.check_cluster,
        network.check_node_versions,
        network.check_clocks,
        network.check_shared_storage,
    ):
        finding = check(real)
        assert finding.status == "ok", finding
    assert network.check_cluster(real).found.startswith("1 nodes, 8 CPU")
    assert list(tmp_path.iterdir()) == []
