"""Places the engines of a run on a Ray cluster that only claims to have GPUs; prints what each actor sees, as JSON."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from raycomplete.config import parse
from raycomplete.engines.cluster import Reservation, nodes_of, plan_run, uses_gpu
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.vllm_start import visible_devices

MODELS = {"base": "organism:base", "aligned": "organism:aligned", "dtype": "bfloat16"}
TREE: dict[str, Any] = {"models": MODELS, "data": {}}
WAIT_S = 120.0


class Look:
    """Stands in an engine's place."""

    def devices(self) -> list[str]:
        return visible_devices()


def place(specs: list[EngineSpec]) -> tuple[list[list[str]], Reservation, list[Any]]:
    """Starts one actor for each engine, as `start_engines` does."""
    reservation = Reservation([spec.bundle() for spec in specs], "pack")
    reservation.wait(WAIT_S, lambda: "")
    actors = [
        ray.remote(Look).options(**spec.resources(), scheduling_strategy=strategy).remote()
        for spec, strategy in zip(specs, reservation.strategies(), strict=True)
    ]
    return ray.get([actor.devices.remote() for actor in actors], timeout=WAIT_S), reservation, actors


def main() -> None:
    ray.init(
        num_cpus=8,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}},
    )
    config = parse(TREE, "test")
    found: dict[str, Any] = {"uses_gpu": uses_gpu(config.cluster)}
    nodes = nodes_of(ray.nodes())
    found["problem"] = plan_run(config, scorers=("base", "aligned"), workers=1).problem(nodes, use_gpu=True)
    large = parse(TREE | {"teacher": {"tensor_parallel": 4}}, "test")
    found["too large"] = plan_run(large, scorers=("base",), workers=1).problem(nodes, use_gpu=True)
    small = [EngineSpec.from_config(config, "rollout", "/model", use_gpu=True)]
    small += [EngineSpec.from_config(config, "scorer", "/model", use_gpu=True)] * 2
    worker = replace(small[0], num_gpus=config.cluster.gpus_per_worker)
    found["shares"] = [spec.num_gpus for spec in (*small, worker)]
    found["one card"], reservation, actors = place([*small, worker])
    for actor in actors:
        ray.kill(actor)
    reservation.release()
    cut = parse(TREE | {"rollout": {"tensor_parallel": 2}}, "test")
    found["sharded"] = place([EngineSpec.from_config(cut, "rollout", "/model", use_gpu=True)])[0]
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
