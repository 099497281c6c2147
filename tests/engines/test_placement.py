"""The plan of a run: who asks for what, what is held at one time, and what a cluster lacks."""

from __future__ import annotations

from typing import Any

import pytest

from raycomplete.config import RunConfig, parse
from raycomplete.engines.placement import Node, Reservation, ResourcePlan, ResourceRequest, nodes_of, plan_run
from raycomplete.runtime.errors import WaitTimeoutError

TREE: dict[str, Any] = {"models": {"base": "organism:base", "aligned": "organism:aligned"}, "data": {}}


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
    cluster = {"cpus_per_engine": 1.0, "gpus_per_engine": 0.5, "cpus_per_worker": 2.0, "gpus_per_worker": 1.0}
    one = plan(cluster=cluster)
    # 1 rollout engine; before: 2 scorers and 2 workers; afterwards: 4 models and 1 worker
    assert (one.cpus, one.gpus) == (1 + max(2 + 4, 4 + 2), 0.5 + max(1 + 2, 2 + 1))
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
