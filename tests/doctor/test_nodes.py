"""Nodes, inputs and the engine: told answers for what is wrong, a real cluster and engine for what works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor import nodes
from raycomplete.doctor.findings import ChildReport, Context
from raycomplete.doctor.probes import look
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"
HERE = look("", "", [])["versions"]


def context(*overrides: str) -> Context:
    return Context(RUN_FILE, load_run_file(RUN_FILE, overrides))


def node(host: str, **other: Any) -> dict[str, Any]:
    plain = {"host": host, "sees_probe": True, "missing": [], "versions": HERE, "rtt_s": 0.01, "skew_s": 0.001}
    return plain | other


def told(*found: dict[str, Any], alive: int | None = None, code: int | None = 0) -> Context:
    answered = context("cluster.address=head:6379")
    report = {"alive": alive or len(found), "resources": {"CPU": 8.0}}
    messages = [report, {"nodes": list(found), "errors": []}] if code == 0 else []
    answered.once("cluster", lambda: ChildReport(messages, code, ""))
    return answered


def test_one_machine_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for check in (nodes.check_cluster, nodes.check_node_versions, nodes.check_clocks, nodes.check_shared_storage):
        finding = check(context())
        assert (finding.status, finding.found.split(":")[0]) == ("ok", "One machine and no cluster")


def test_a_cluster_that_does_not_answer_is_a_failure() -> None:
    silent = told(code=None)
    assert "No Ray cluster answers at head:6379 (no answer within 120 s)" in nodes.check_cluster(silent).found
    assert nodes.check_clocks(silent).status == "warn"
    assert "1 of them ran no task" in nodes.check_cluster(told(node("a"), alive=2)).found


def test_a_cluster_that_is_too_small_fails_unless_the_run_waits_for_nodes() -> None:
    for wait_s, status in ((10, "fail"), (900, "warn")):
        asked = context("cluster.address=head:6379", "cluster.cpus_per_worker=10", f"cluster.wait_for_nodes_s={wait_s}")
        asked.once("cluster", lambda: ChildReport([{"alive": 1, "resources": {"CPU": 8.0}}, {"nodes": [node("a")]}]))
        finding = nodes.check_cluster(asked)
        assert (finding.status, "the run needs 11.5 CPU" in finding.found) == (status, True)


def test_each_difference_between_nodes_is_found() -> None:
    good = node("a")
    late = nodes.check_clocks(told(good, node("b", skew_s=-7.5)))
    assert (late.status, "-7.500 s (b)" in late.found) == ("fail", True)
    assert nodes.check_clocks(told(good, node("b", skew_s=4.9))).status == "ok"
    blind = nodes.check_shared_storage(told(good, node("b", sees_probe=False)))
    assert (blind.status, blind.found.startswith("b cannot read ")) == ("fail", True)
    missing = nodes.check_shared_storage(told(good, node("b", missing=["/models/x"])))
    assert missing.found == "b lacks /models/x."
    other = nodes.check_node_versions(told(good, node("b", versions=HERE | {"ray": "2.59.0"})))
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
    for check in (nodes.check_cluster, nodes.check_node_versions, nodes.check_clocks, nodes.check_shared_storage):
        finding = check(real)
        assert finding.status == "ok", finding
    assert nodes.check_cluster(real).found.startswith("1 nodes, 8 CPU")
    assert list(tmp_path.iterdir()) == []
