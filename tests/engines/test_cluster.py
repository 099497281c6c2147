"""The resources of a run: who asks for what, what a cluster lacks, and the wait for its nodes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from raycomplete.config import ClusterConfig, RunConfig, parse
from raycomplete.engines import cluster
from raycomplete.engines.cluster import Node, Reservation, ResourcePlan, ResourceRequest, nodes_of, plan_run
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import SetupError, WaitTimeoutError

TREE: dict[str, Any] = {"models": {"base": "organism:base", "aligned": "organism:aligned"}, "data": {}}
PLAN = ResourcePlan(
    (ResourceRequest("rollout engine", 1, 1.0, 0.5), ResourceRequest("training worker", 2, 1.0, 1.0, "training"))
)


def config(**sections: Any) -> RunConfig:
    return parse(TREE | sections, "test")


def plan(**sections: Any) -> ResourcePlan:
    return plan_run(config(**sections), scorers=("base", "aligned"), workers=2, extras=4, attack_workers=1)


def test_every_role_of_a_run_has_its_request() -> None:
    assert {
        item.role: item.replicas for item in plan(teacher={"replicas": 3}, rollout={"num_engines": 2}).requests
    } == {
        "rollout engine": 2,
        "base scorer": 3,
        "aligned scorer": 3,
        "training worker": 2,
        "Ray Train controller": 1,
        "training worker of the attack": 1,
        "Ray Train controller of the attack": 1,
        "model of attacks and judge": 4,
    }


def test_what_is_needed_is_the_larger_phase_and_what_stays_throughout() -> None:
    cluster = {"gpus_per_engine": 0.5, "gpus_per_worker": 1.0}
    one = plan(cluster=cluster)
    # 1 rollout engine; before: 2 scorers and 2 workers; afterwards: 4 models and 1 worker
    assert (one.cpus, one.gpus) == (0.5 + max(1 + 1, 2 + 0.5), 0.5 + max(1 + 2, 2 + 1))
    assert ResourcePlan().cpus == 0


def test_tensor_parallel_engines_reserve_whole_devices_of_one_node() -> None:
    one = plan(teacher={"tensor_parallel": 4}, cluster={"gpus_per_engine": 0.2})
    request = next(item for item in one.requests if item.role == "base scorer")
    assert request.bundle(use_gpu=True) == {"CPU": 2.0, "GPU": 4.0}
    assert request.bundle(use_gpu=False) == {"CPU": 2.0}
    pairs = [Node(64, 2)] * 8
    assert one.problem(pairs, use_gpu=True) == "No node is large enough for one base scorer (2 CPU, 4 GPU)."
    assert one.problem([*pairs, Node(64, 8)], use_gpu=True) == ""


@pytest.mark.parametrize(
    ("nodes", "use_gpu", "problem"),
    [
        ([Node(2, 0)], False, ""),
        ([Node(1, 0)], False, "The run needs 2 CPU and the cluster has 1."),
        ([Node(8, 1)], True, "The run needs 3 GPU and the cluster has 1."),
        ([Node(8, 1)], False, ""),
        ([Node(0.25, 4)] * 8, True, "No node is large enough for one engine (0.5 CPU, 0.5 GPU)."),
        ([], False, "The run needs 2 CPU and the cluster has 0."),
    ],
)
def test_what_is_missing_is_said(nodes: list[Node], use_gpu: bool, problem: str) -> None:
    resources = ResourcePlan((ResourceRequest("engine", 2, 0.5, 0.5), ResourceRequest("worker", 2, 0.5, 1.0)))
    assert resources.problem(nodes, use_gpu=use_gpu) == problem


def test_the_table_puts_needed_beside_available() -> None:
    entries = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0 * 2**30}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 4.0 * 2**30}},
    ]
    resources = ResourcePlan(
        (ResourceRequest("engine", 3, 0.5, 0.25), ResourceRequest("worker", 1, 2.0, 1.0, "training"))
    )
    table = resources.table(nodes_of(entries), use_gpu=True)
    assert table[1] == ["engine", "3", "0.5", "0.25", "1.5", "0.75", ""]
    assert table[-2:] == [
        ["needed at one time", "", "", "", "3.5", "1.75", ""],
        ["available (2 nodes, 12 GiB memory)", "", "", "", "6", "1", ""],
    ]
    lines = resources.text(nodes_of(entries), use_gpu=False).splitlines()
    assert len(lines) == len(table)
    assert lines[-2].split() == ["needed", "at", "one", "time", "3.5", "0"]


@pytest.mark.slow
def test_engines_without_a_place_are_told_with_the_table(ray_cluster: None) -> None:
    reservation = Reservation([{"CPU": 100.0}], "pack")
    with pytest.raises(WaitTimeoutError, match=r"no place for 1 engines in 0\.5 s (.|\n)*needed and there"):
        reservation.wait(0.5, lambda: "needed and there")
    reservation.release()


class Joining:
    """Stands for a cluster: one node more at every look, and what its autoscaler was asked for."""

    def __init__(self, nodes: list[dict[str, float]]) -> None:
        self._nodes = nodes
        self.looks = 0
        self.asked: list[list[dict[str, float]]] = []

    def nodes(self) -> list[dict[str, Any]]:
        self.looks += 1
        return [{"Alive": True, "Resources": resources} for resources in self._nodes[: self.looks]]

    def ask(self, *, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)


def check(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    plan: ResourcePlan = PLAN,
    wait_s: float = 30,
    **settings: Any,
) -> tuple[cluster.Cluster, Joining]:
    joining = Joining(nodes)
    monkeypatch.setattr(cluster.ray, "nodes", joining.nodes)
    monkeypatch.setattr(cluster, "request_resources", joining.ask)
    monkeypatch.setattr(cluster, "_POLL_S", 0.001)
    found = cluster._check(ClusterConfig(gpus_per_worker=1, **settings), plan, Console(quiet=True), wait_s=wait_s)
    return found, joining


def test_a_run_waits_for_nodes_that_join_and_tells_the_autoscaler_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found, joining = check(monkeypatch, [{"CPU": 1.0}] * 3)
    assert not found.use_gpu
    assert joining.asked == [[{"CPU": 1.0}] * 3, []]  # and lets go of it once the nodes are there
    assert "available (3 nodes)" in found.table()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AuthenticationError("no token"), "head:6379 asks for a token"),
        (ConnectionError(), r"No Ray cluster answers at head:6379 \(ConnectionError\)"),
        (ValueError("\nno port"), r"answers at head:6379 \(no port\)"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_a_refusal(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(SetupError, match=message), cluster.connect(ClusterConfig(address="head:6379"), PLAN):
        pass


@pytest.mark.parametrize(("shared", "available", "given"), [(9, 16, 8), (7, 16, 2), (9, 15, 2)])
def test_the_object_store_holds_the_weights_of_rollouts_where_memory_does(
    shared: int, available: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def start(**options: Any) -> None:
        asked.append(options["object_store_memory"] / 2**30)
        raise ValueError("no cluster")

    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster, "free_bytes", lambda _: shared * 2**30)
    monkeypatch.setattr(cluster, "estimate_available_memory", lambda: available * 2**30)
    with pytest.raises(SetupError), cluster.connect(ClusterConfig(address="local"), PLAN, store_bytes=8 * 2**30):
        pass
    assert asked == [given]


def test_when_the_wait_is_over_the_table_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"The run needs 3 CPU and the cluster has 2") as error:
        check(monkeypatch, [{"CPU": 2.0}], wait_s=0)
    text = str(error.value)
    assert re.search(r"^training worker +2 ", text, re.MULTILINE)
    assert "available (1 node)" in text
    assert "cluster.timeout_s" in text


@pytest.mark.parametrize(
    ("node", "plan", "settings", "message"),
    [
        ({"CPU": 8.0}, PLAN, {"use_gpu": "always"}, "use_gpu is 'always' and the cluster has no GPU"),
        (
            {"CPU": 8.0},
            ResourcePlan((ResourceRequest("base scorer", 1, 1, 2, devices=2),)),
            {},
            "over 2 GPUs, and this run uses none",
        ),
        ({"CPU": 8.0, "GPU": 2.0}, PLAN, {}, "needs 2.5 GPU and the cluster has 2"),
    ],
)
def test_what_can_never_run_is_refused(
    node: dict[str, float], plan: ResourcePlan, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match=message):
        check(monkeypatch, [node], plan, wait_s=0, **settings)
