"""A small real run in a process of its own: Ray as raycomplete starts it, one engine, a run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from raycomplete.config import load_run_file
from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path
from raycomplete.engines.cluster import ResourcePlan, connect, engine_request
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.run import OutputFolder
from raycomplete.engines.spec import EngineSpec

STRANGER = """
import ray
try:
    ray.init(address={address!r}, logging_level=50, log_to_driver=False)
except BaseException as error:
    print("kept out", type(error).__name__)
else:
    print("let in", ray.get(ray.remote(lambda: 1).remote(), timeout=20))
"""


def main(root: Path) -> None:
    run_file = Path(__file__).resolve().parents[2] / "jobs" / "organism.yaml"
    config = load_run_file(run_file, [f"output.root={root / 'runs'}"])
    with connect(config.cluster, ResourcePlan((engine_request(config.cluster, "engine", 1),))):
        folder = OutputFolder(config, same=()).open()
        codec = ChatCodec(checkpoint_path("base"))
        spec = EngineSpec(str(checkpoint_path("base")), "float32", 64)
        pool = RolloutPool.start(RolloutOptions(spec, tuple(sorted(codec.eos_ids)), config.rollout))
        (tokens,) = pool.generate([codec.encode_prompt("a b")], max_tokens=4, temperature=0.0)
        pool.stop()
        said = {
            "run_folder": str(folder),
            "tokens": len(tokens),
            "auth_mode": os.environ.get("RAY_AUTH_MODE"),
            "listening": steady(listening),
            "stranger": stranger(ray.get_runtime_context().gcs_address),
        }
    print(json.dumps(said))


def listening() -> list[dict[str, Any]]:
    """Every TCP port that this process or what it started listens on."""
    found = []
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            name, connections = " ".join(process.cmdline())[:200], process.net_connections("tcp")
        except psutil.Error:
            continue  # ended meanwhile
        found += [
            {"process": name, "host": connection.laddr.ip, "port": connection.laddr.port}
            for connection in connections
            if connection.status == psutil.CONN_LISTEN
        ]
    return found


def steady(look: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Keeps what two looks have in common: a child between fork and exec still shows its parent's sockets and name."""
    first = look()
    time.sleep(1.0)
    second = look()
    return [entry for entry in first if entry in second]


def stranger(address: str) -> str:
    """Tells what happens to someone who reaches the head's port with another token."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER.format(address=address)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return done.stdout.strip() or done.stderr[-500:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
