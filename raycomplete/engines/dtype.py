"""The number format of weights: `models.dtype: auto` is resolved here, before anything is named by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycomplete.config import ClusterConfig, RunConfig
from raycomplete.engines.cluster import ResourcePlan, connect, is_local, uses_gpu
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import bfloat16_units, choose_dtype
from raycomplete.runtime.ray_calls import wait_for

_ANSWER_S = 120.0  # a node may have to start a process first


def resolve_dtype(config: RunConfig, console: Console) -> RunConfig:
    """Puts the number format that fits the nodes that train in place of `models.dtype: auto`.

    It is bfloat16 on GPUs, and on processors with units for it, else float32. Of several nodes the one with the fewest
    units decides. A run file that asks for bfloat16 where neither is there is warned in one sentence.
    """
    asked = config.models.dtype
    if asked == "float32":
        return config
    units = _fewest_units(config.cluster)
    dtype, why = choose_dtype(use_gpu=units is None, units=units or ())
    if asked == "auto":
        return config.model_copy(update={"models": config.models.model_copy(update={"dtype": dtype})})
    if dtype == "float32":
        console.note(f"models.dtype is bfloat16 and {why}, which makes it slower than float32, which auto would take")
    return config


def _fewest_units(config: ClusterConfig) -> tuple[str, ...] | None:
    """Returns the bfloat16 units of the node that has the fewest; None where the run will use GPUs."""
    if is_local(config) and not ray.is_initialized():
        return None if config.use_gpu != "never" and torch.cuda.is_available() else bfloat16_units()
    with _connected(config) as use_gpu:
        if use_gpu:
            return None
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in ray.nodes() if node["Alive"]]
        task = ray.remote(num_cpus=0)(bfloat16_units)
        calls = [task.options(scheduling_strategy=place).remote() for place in places]
        found = [wait_for(call, who="node", what="its processor's units", timeout_s=_ANSWER_S) for call in calls]
    fewest: tuple[str, ...] = min(found, key=len)
    return fewest


@contextmanager
def _connected(config: ClusterConfig) -> Iterator[bool]:
    if ray.is_initialized():  # in an actor of the service
        yield uses_gpu(config)
        return
    with connect(config, ResourcePlan()) as cluster:
        yield cluster.use_gpu
