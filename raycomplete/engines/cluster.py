"""The resources of a run, and the Ray cluster that has them: what is missing is refused before anything starts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.utils import estimate_available_memory
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycomplete.config import ClusterConfig, RunConfig
from raycomplete.engines.spec import OBJECT_STORE_BYTES, engine_share
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import SetupError, WaitTimeoutError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.logs import run_environment
from raycomplete.runtime.machine import available_cpus, free_bytes
from raycomplete.runtime.ray_calls import keep_off_the_screen
from raycomplete.runtime.signals import stop, take_over

_POLL_S = 1.0
_FIRST, _AFTERWARDS = "at first", "evaluation"


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of all actors of one role."""

    role: str  # "base scorer"
    replicas: int
    cpus: float  # of each actor
    gpus: float  # of each actor, where the run uses GPUs
    phase: str = ""  # part of the run in which they exist, empty for all; phases hand on what they held
    devices: int = 1  # GPUs that hold one model together; more than 1 is tensor parallelism

    def bundle(self, *, use_gpu: bool) -> dict[str, float]:
        """Returns what one actor reserves, as a bundle of a placement group."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if use_gpu and self.gpus > 0 else {})


@dataclass(frozen=True)
class Node:
    """A node of the cluster; memory in GiB, 0 where Ray does not say."""

    cpus: float
    gpus: float
    memory_gib: float = 0.0


@dataclass(frozen=True)
class ResourcePlan:
    """Everything that a run places."""

    requests: tuple[ResourceRequest, ...] = ()

    @property
    def cpus(self) -> float:
        """Most logical CPUs that are held at one time."""
        return self._most("cpus")

    @property
    def gpus(self) -> float:
        """Most GPUs that are held at one time, where the run uses GPUs."""
        return self._most("gpus")

    def _most(self, name: str) -> float:
        held: defaultdict[str, float] = defaultdict(float)
        for item in self.requests:
            held[item.phase] += item.replicas * getattr(item, name)
        return held.pop("", 0.0) + max(held.values(), default=0.0)

    def problem(self, nodes: Sequence[Node], *, use_gpu: bool) -> str:
        """Says in words what the nodes lack; empty where nothing is known to be missing."""
        for name, needed, there in (
            ("CPU", self.cpus, sum(node.cpus for node in nodes)),
            ("GPU", self.gpus if use_gpu else 0.0, sum(node.gpus for node in nodes)),
        ):
            if needed > there + 1e-6:
                return f"The run needs {needed:g} {name} and the cluster has {there:g}."
        for item in self.requests:
            gpus = item.gpus if use_gpu else 0.0
            if item.replicas and not any(item.cpus <= node.cpus + 1e-6 and gpus <= node.gpus + 1e-6 for node in nodes):
                return f"No node is large enough for one {item.role} ({item.cpus:g} CPU, {gpus:g} GPU)."
        return ""

    def table(self, nodes: Sequence[Node], *, use_gpu: bool) -> list[list[str]]:
        """Returns the table of needed against available; its first row holds the headings."""
        table = [["role", "replicas", "CPU each", "GPU each", "CPU", "GPU", "when"]]
        for item in self.requests:
            gpus = item.gpus if use_gpu else 0.0
            numbers = (item.cpus, gpus, item.replicas * item.cpus, item.replicas * gpus)
            table.append([item.role, str(item.replicas), *(f"{number:g}" for number in numbers), item.phase])
        needed = (self.cpus, self.gpus if use_gpu else 0.0)
        table.append(["needed at one time", "", "", "", *(f"{number:g}" for number in needed), ""])
        memory = sum(node.memory_gib for node in nodes)
        there = f"available ({len(nodes)} node{'s' * (len(nodes) != 1)}{f', {memory:.0f} GiB memory' * (memory > 0)})"
        sums = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
        return [*table, [there, "", "", "", *(f"{number:g}" for number in sums), ""]]

    def text(self, nodes: Sequence[Node], *, use_gpu: bool) -> str:
        """Returns the table as lines of an error message."""
        table = self.table(nodes, use_gpu=use_gpu)
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        return "\n".join(
            "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in table
        )


def engine_request(
    config: ClusterConfig, role: str, replicas: int, phase: str = "", tensor_parallel: int = 1
) -> ResourceRequest:
    return ResourceRequest(role, replicas, *engine_share(config, tensor_parallel), phase, tensor_parallel)


def plan_run(
    config: RunConfig, *, scorers: Sequence[str] = (), workers: int = 0, extras: int = 0, attack_workers: int = 0
) -> ResourcePlan:
    """Plans the resources of a run.

    `scorers` are the frozen models that are scored, `extras` engines and models that an evaluation holds besides the
    rollout engines (scorers are gone by then), `attack_workers` training workers of the fine-tuning attack.
    """
    cluster, teacher, rollout = config.cluster, config.teacher, config.rollout
    requests = [
        engine_request(cluster, "rollout engine", rollout.num_engines, tensor_parallel=rollout.tensor_parallel),
        *(
            engine_request(cluster, f"{role} scorer", teacher.replicas, _FIRST, teacher.tensor_parallel)
            for role in scorers
        ),
    ]
    for phase, count, suffix in ((_FIRST, workers, ""), (_AFTERWARDS, attack_workers, " of the attack")):
        if count:
            share = (cluster.cpus_per_worker, cluster.gpus_per_worker)
            requests.append(ResourceRequest(f"training worker{suffix}", count, *share, phase))
            requests.append(ResourceRequest(f"Ray Train controller{suffix}", 1, 0.0, 0.0, phase))
    if extras:
        requests.append(engine_request(cluster, "model of attacks and judge", extras, phase=_AFTERWARDS))
    return ResourcePlan(tuple(requests))


class Reservation:
    """A placement group for engines that start and end together.

    When a node dies, Ray moves its bundles to nodes with room, or waits for one, and starts the actors there again.
    """

    def __init__(self, bundles: Sequence[dict[str, float]], strategy: str) -> None:
        self._group: Any = placement_group(list(bundles), strategy=strategy.upper())
        self._count = len(bundles)

    def strategies(self) -> list[PlacementGroupSchedulingStrategy]:
        """Returns Ray's scheduling strategy of each engine, by its number."""
        return [
            PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            for index in range(self._count)
        ]

    def wait(self, timeout_s: float, table: Callable[[], str]) -> None:
        """Waits until every bundle is placed; `table` returns needed against available for the error."""
        deadline = time.monotonic() + timeout_s
        while not self._group.wait(min(_POLL_S, timeout_s)):
            stop.check()
            if time.monotonic() < deadline:
                continue
            raise WaitTimeoutError(
                f"Ray found no place for {self._count} engines in {timeout_s:g} s (cluster.timeout_s).\n{table()}\n",
                "Others may hold what is free (`ray status` tells), or cluster.placement asks for more nodes than "
                "there are.",
            )

    def release(self) -> None:
        """Removes the placement group, and ends what still runs in it."""
        remove_placement_group(self._group)


def nodes_of(entries: Sequence[dict[str, Any]]) -> list[Node]:
    """Returns the nodes that are alive, from the entries of `ray.nodes()`."""
    found = [entry["Resources"] for entry in entries if entry["Alive"]]
    return [Node(has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0) / 2**30) for has in found]


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is connected to, and the resources that the run asked for."""

    use_gpu: bool
    plan: ResourcePlan = field(default_factory=ResourcePlan)

    def table(self) -> str:
        """Returns needed against what is there now, for messages."""
        return self.plan.text(nodes_of(ray.nodes()), use_gpu=self.use_gpu)


@contextmanager
def connect(
    config: ClusterConfig, plan: ResourcePlan, console: Console | None = None, store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this machine, and leaves it as it was found.

    A local cluster counts CPUs generously: on a laptop with 2 cores several engines share them, which is slow but
    works. On a cluster that was there before, missing resources are an error, once `cluster.timeout_s` is over.
    Its object store is larger than 2 GiB only where shared memory holds that, since Ray would put it on disk.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    local, group = is_local(config), os.getpgrp()
    keep_off_the_screen()
    try:
        if local:
            # No cloud takes this machine away; to watch for that takes a process of its own, in the way of the worker.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            room = min(free_bytes(Path("/dev/shm")), estimate_available_memory() // 2)
            ray.init(
                address="local",  # a cluster of our own, whatever else runs on this machine
                num_cpus=math.ceil(max(available_cpus(), plan.cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=store_bytes if store_bytes <= room else OBJECT_STORE_BYTES,
            )
        else:
            named = {"env_vars": run_environment()}  # a local cluster inherits it anyway
            ray.init(address=config.address, runtime_env=named, log_to_driver=False, logging_level=logging.ERROR)
    except (AuthenticationError, ConnectionError, ValueError, RuntimeError) as error:
        raise _refusal(error, config.address or os.environ.get("RAY_ADDRESS", "this machine")) from error
    if os.getpgrp() != group:  # Ray makes a group of us and its processes, which Ctrl-C under `make` would not reach
        with suppress(OSError):
            os.setpgid(0, group)
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # Ray lets any user read it; there may be none, or it is another user's
        if token.stat().st_mode & 0o077:
            token.chmod(PRIVATE)
    try:
        take_over()
        with stop.polled():
            yield _check(config, plan, console or Console(quiet=True), wait_s=0.0 if local else config.nodes_timeout_s)
    finally:
        ray.shutdown()


def is_local(config: ClusterConfig) -> bool:
    """Tells whether `connect` starts a cluster of its own on this machine."""
    return config.address == "local" or (config.address is None and "RAY_ADDRESS" not in os.environ)


def uses_gpu(config: ClusterConfig) -> bool:
    """Tells whether actors on the cluster that this process is connected to may use GPUs."""
    return config.use_gpu != "never" and ray.cluster_resources().get("GPU", 0) > 0


def _refusal(error: Exception, place: str) -> SetupError:
    """Says why there is no connection, and what to do."""
    if isinstance(error, AuthenticationError):
        return SetupError(
            f"The Ray cluster at {place} asks for a token, and this process has none that fits.",
            "Put the cluster's token into RAY_AUTH_TOKEN, into a file that RAY_AUTH_TOKEN_PATH names, or into "
            "~/.ray/auth_token; on the head, `ray get-auth-token` prints it.",
        )
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return SetupError(
        f"No Ray cluster answers at {place} ({first}).",
        "Check cluster.address, or leave it out to start one on this machine.",
    )


def _check(config: ClusterConfig, plan: ResourcePlan, console: Console, *, wait_s: float) -> Cluster:
    use_gpu, problem = _wait_for_nodes(config, plan, wait_s)
    nodes = nodes_of(ray.nodes())
    if problem:
        raise SetupError(
            f"{problem}\n{plan.text(nodes, use_gpu=use_gpu)}\n",
            "Add nodes, or lower train.num_workers, the numbers of engines, cluster.gpus_per_engine or "
            "gpus_per_worker. Where nodes start on demand, raise cluster.timeout_s.",
        )
    check_devices(config, plan, use_gpu=use_gpu)
    console.table("Needed and available", plan.table(nodes, use_gpu=use_gpu))
    return Cluster(use_gpu=use_gpu, plan=plan)


def check_devices(config: ClusterConfig, plan: ResourcePlan, *, use_gpu: bool) -> None:
    """Refuses a plan that no machine can carry out, however large."""
    sharded = next((item for item in plan.requests if item.devices > 1), None)
    if sharded is not None and not use_gpu:
        raise SetupError(
            f"Tensor parallelism cuts the {sharded.role} over {sharded.devices} GPUs, and this run uses none.",
            "Set teacher.tensor_parallel and rollout.tensor_parallel to 1.",
        )
    workers = sum(item.replicas for item in plan.requests if item.role == "training worker")
    if use_gpu and workers > 1 and config.gpus_per_worker <= 0.5:
        raise SetupError(
            f"{workers} training workers with {config.gpus_per_worker:g} GPU each could share one GPU, and NCCL "
            "refuses that.",
            "Set cluster.gpus_per_worker to 1.",
        )


def _wait_for_nodes(config: ClusterConfig, plan: ResourcePlan, wait_s: float) -> tuple[bool, str]:
    """Tells an autoscaler what is needed; returns if the run uses GPUs, and what is missing when the wait is over."""
    deadline = time.monotonic() + wait_s
    asked: list[dict[str, float]] = []
    try:
        while True:
            stop.check()
            nodes = nodes_of(ray.nodes())
            has_gpu = any(node.gpus > 0 for node in nodes)
            use_gpu = config.use_gpu == "always" or (config.use_gpu == "auto" and has_gpu)
            problem = plan.problem(nodes, use_gpu=use_gpu)
            if use_gpu and not has_gpu:
                problem = "cluster.use_gpu is 'always' and the cluster has no GPU."
            if not problem or time.monotonic() >= deadline:
                return use_gpu, problem
            bundles = [item.bundle(use_gpu=use_gpu) for item in plan.requests for _ in range(item.replicas)]
            if bundles != asked:  # the first node with a GPU makes it a run that needs more of them
                _ask_autoscaler(bundles)
                asked = bundles
            time.sleep(min(_POLL_S, wait_s))
    finally:
        if asked:  # Ray keeps such a request after its job: from here on actors and groups say what is needed
            _ask_autoscaler([])


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    """Asks the autoscaler, where there is one, for room for these bundles."""
    with suppress(Exception):  # there may be no autoscaler
        request_resources(bundles=[bundle for bundle in bundles if any(bundle.values())])
