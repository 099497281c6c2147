"""The number format of weights: `models.dtype: auto` is resolved here, before anything is named by its settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycomplete.config import ClusterConfig, RunConfig
from raycomplete.engines.cluster import ResourcePlan, connect, is_local, uses_gpu
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import bfloat16_units, choose_dtype
from raycomplete.runtime.ray_calls import wait_for

_SIZE, _REPEATS = 512, 3  # of a product, which takes 30 ms where bfloat16 is slow
_ANSWER_S = 120.0  # a node may have to import torch first


class Processor(NamedTuple):
    """The processor of one node: its instructions for bfloat16, and the time of bfloat16 over that of float32."""

    units: tuple[str, ...]
    slowdown: float


def resolve_dtype(config: RunConfig, console: Console) -> RunConfig:
    """Puts the number format that fits the nodes that train in place of `models.dtype: auto`.

    It is bfloat16 on GPUs, and on processors with units for it, else float32. Of several nodes the slowest decides. A
    run file that asks for bfloat16 where neither is there is warned in one sentence, with a ratio measured just then.

    Raises:
        SetupError: The cluster cannot be reached.
    """
    asked = config.models.dtype
    if asked == "float32":
        return config
    processor = _slowest(config.cluster)
    dtype, why = choose_dtype(use_gpu=processor is None, units=processor.units if processor else ())
    if asked == "auto":
        return config.model_copy(update={"models": config.models.model_copy(update={"dtype": dtype})})
    if processor and dtype == "float32":
        console.note(
            f"models.dtype is bfloat16 and {why}: a product of matrices takes {processor.slowdown:.2g} times as long "
            "as in float32, which auto would take"
        )
    return config


def examine() -> Processor:
    """Examines the processor of this process."""
    return Processor(bfloat16_units(), _seconds(torch.bfloat16) / _seconds(torch.float32))


def _slowest(config: ClusterConfig) -> Processor | None:
    """Returns the slowest processor of the nodes; None where the run will use GPUs, and none is examined."""
    if is_local(config) and not ray.is_initialized():
        return None if config.use_gpu != "never" and torch.cuda.is_available() else examine()
    with _connected(config) as use_gpu:
        if use_gpu:
            return None
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in ray.nodes() if node["Alive"]]
        task = ray.remote(num_cpus=0)(examine)
        calls = [task.options(scheduling_strategy=place).remote() for place in places]
        found = [wait_for(call, who="node", what="its processor's speed", timeout_s=_ANSWER_S) for call in calls]
    slowest: Processor = min(found, key=lambda item: (len(item.units), -item.slowdown))
    return slowest


@contextmanager
def _connected(config: ClusterConfig) -> Iterator[bool]:
    if ray.is_initialized():  # in an actor of the service
        yield uses_gpu(config)
        return
    with connect(config, ResourcePlan()) as cluster:
        yield cluster.use_gpu


def _seconds(dtype: torch.dtype) -> float:
    """Returns the time of the fastest of a few products."""
    factor = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        factor @ factor
        times.append(time.perf_counter() - started)
    return min(times[1:])  # the first one sets up its kernels
