"""cluster.yaml against Ray's own schema and rules, without a cloud."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycomplete.commands.submit import STOP_WAIT_S

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return tree


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="private to Ray, may move")
    util.validate_config(util.prepare_config(cluster))


def test_ray_refuses_a_misspelt_key(cluster: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="private to Ray, may move")
    with pytest.raises(Exception, match="max_worker"):
        util.validate_config(util.prepare_config({**cluster, "max_worker": 1}))


def test_head_has_no_gpu_and_every_worker_group_has_one(cluster: dict[str, Any]) -> None:
    groups = dict(cluster["available_node_types"])
    head = groups.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}  # no run fits there, so each waits for a GPU
    assert groups
    assert all(group["resources"]["GPU"] >= 1 for group in groups.values())


def test_limits_add_up(cluster: dict[str, Any]) -> None:
    groups = [group for group in cluster["available_node_types"].values() if "max_workers" in group]
    assert sum(group["max_workers"] for group in groups) == cluster["max_workers"]
    assert sum(group["min_workers"] for group in groups) >= 1


def test_every_node_runs_these_sources_and_checks_the_token(cluster: dict[str, Any]) -> None:
    assert "." in cluster["file_mounts"].values()
    assert any("make setup" in command for command in cluster["setup_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in cluster[key][-1]
        assert "--metrics-export-port=8080" in cluster[key][-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_a_stopped_job_has_time_for_a_checkpoint(cluster: dict[str, Any]) -> None:
    found = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", cluster["head_start_ray_commands"][-1])
    assert found
    assert int(found[1]) == STOP_WAIT_S


def test_runs_lie_on_storage_that_every_node_mounts(cluster: dict[str, Any]) -> None:
    (mount,) = (command for command in cluster["setup_commands"] if " mount " in command)
    assert "mountpoint -q /shared ||" in mount  # set-up runs again at every `ray up`
    assert "nfs-common" in cluster["setup_commands"][0]
