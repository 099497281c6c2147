"""Scorers on two raylets of this machine, killed while they read. Run by test_scorers.py in a process of its own.

It prints what was seen, one JSON object for each part.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from raycomplete.config import TeacherConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.heads import read_head_spec
from raycomplete.data.organism import checkpoint_path
from raycomplete.engines.cluster import Reservation
from raycomplete.engines.score_cache import HiddenArray, ScoreRequest
from raycomplete.engines.scorers import KvStore, Scorer, ScorerReplica, TeacherClient
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import ProcessDiedError, QuarantinedSequenceError

DEADLY = ScoreRequest((13, 13, 13), 1)
TEACHER = TeacherConfig(replicas=2, max_num_batched_tokens=4096)
NO_HEAD: Any = SimpleNamespace(model_fingerprint="none", tokenizer_hash="none")
SPEC = EngineSpec(str(checkpoint_path("aligned")), "float32", 128, num_cpus=1)


class Fragile(Scorer):
    """A scorer whose process dies of one sequence; no engine, so that it is back within seconds."""

    def _ready_engine(self) -> Any:
        return self

    def hidden_states(self, requests: list[ScoreRequest]) -> list[HiddenArray]:
        if DEADLY in requests:
            os.kill(os.getpid(), signal.SIGKILL)
        return [np.asarray(request.token_ids, np.float32)[request.num_prompt_tokens :, None] for request in requests]


def main() -> None:
    config = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    store = 300 * 2**20  # bytes
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": store, "_system_config": config}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        print(json.dumps(quarantine(Path(sys.argv[1]))), flush=True)
        print(json.dumps(scorers(cluster, nodes)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def scorers(cluster: Cluster, nodes: list[Any]) -> dict[str, Any]:
    """Two real engines, one a node: one is killed, then the node of the other."""
    codec = ChatCodec(checkpoint_path("aligned"))
    path = checkpoint_path("aligned")
    head = read_head_spec(path, codec.vocab_size, codec.fingerprint())
    rng = np.random.default_rng(0)
    batch = [
        ScoreRequest(tuple(int(token) for token in rng.integers(5, 150, length)), 4)
        for length in rng.integers(60, 120, 500)
    ]
    reservation = Reservation([{"CPU": 1.0}] * 2, "spread")
    reservation.wait(60, lambda: "")
    strategies = reservation.strategies()
    client = TeacherClient.start("aligned", head, SPEC, TEACHER, batch[:2], strategies=strategies, cache_bytes=0)
    client.wait_until_ready(timeout_s=300)
    where = [ray.get(replica.actor.__ray_call__.remote(lambda _: where_am_i())) for replica in client._replicas]
    undisturbed = client.collect(client.submit(batch))

    killed = disturbed(client, batch, 0, lambda: os.kill(where[0]["pid"], signal.SIGKILL))
    lost = next(node for node in nodes if node.node_id == where[1]["node"])
    moved = disturbed(client, batch, 1, lambda: cluster.remove_node(lost, allow_graceful=False))
    after = [ray.get(replica.actor.__ray_call__.remote(lambda _: where_am_i())) for replica in client._replicas]
    table = placement_group_table(reservation._group)
    seen = {
        "nodes_before": len({place["node"] for place in where}),
        "kill_difference": difference(undisturbed, killed["arrays"]),
        "kill_hit_a_reading": killed["was_reading"],
        "node_difference": difference(undisturbed, moved["arrays"]),
        "node_hit_a_reading": moved["was_reading"],
        "moved_off_the_dead_node": all(place["node"] != where[1]["node"] for place in after),
        "group": table["state"],
        "error": death(client),
    }
    client.stop()
    reservation.release()
    return seen


def disturbed(
    client: TeacherClient, batch: list[ScoreRequest], replica: int, strike: Callable[[], None]
) -> dict[str, Any]:
    """Scores of a batch, with a blow while the replica reads a part of it."""
    note = f"{client._prefix}/reads/{client._replicas[replica].name}"
    call = client.submit(batch)
    deadline = time.monotonic() + 30
    while not (reads := KvStore().read(note)) and time.monotonic() < deadline:
        time.sleep(0.002)
    strike()
    return {"arrays": client.collect(call), "was_reading": bool(reads)}


def death(client: TeacherClient) -> dict[str, str]:
    """Kills a scorer in the middle of a call that nobody repeats, and returns what the error says."""
    replica = client._replicas[0]
    reference = replica.actor.__ray_call__.options(max_task_retries=0).remote(
        lambda _: os.kill(os.getpid(), signal.SIGKILL)
    )
    try:
        replica.wait(reference, "anything", 60)
    except ProcessDiedError as error:
        return dict(error.details()) | {
            "text": str(error),
            "log": Path(error.log_path).name,
            "log_is_there": str(Path(error.log_path).is_file()),
        }
    return {}


def quarantine(folder: Path) -> dict[str, Any]:
    """Real processes that die of a sequence: it is quarantined, and the others have their scores."""
    prefix = "fragile"
    actor = ray.remote(Fragile)
    handles = [
        ScorerReplica(
            f"scorer {index}",
            actor.options(num_cpus=0.1, max_restarts=-1).remote(
                "aligned", NO_HEAD, SPEC, [], f"{prefix}/reads/scorer {index}"
            ),
        )
        for index in range(2)
    ]
    client = TeacherClient("aligned", handles, 4096, prefix, folder)
    batch = [ScoreRequest((number, number, number), 1) for number in (11, 13)]
    try:
        client.collect(client.submit(batch))
        partial: list[Any] = []
    except QuarantinedSequenceError as error:
        partial = [None if array is None else array[:, 0].tolist() for array in error.partial]
    client.stop()
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return {"partial": partial, "records": records}


def where_am_i() -> dict[str, Any]:
    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


def difference(first: list[HiddenArray], second: list[HiddenArray]) -> float:
    """The largest difference of any number of any sequence."""
    return max(float(np.abs(one - other).max()) for one, other in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
