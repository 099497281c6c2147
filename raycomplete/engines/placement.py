"""The resources of a run: one request a role, their sum against the cluster, and the placement groups of engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycomplete.config import ClusterConfig, RunConfig
from raycomplete.engines.spec import engine_share
from raycomplete.runtime.errors import WaitTimeoutError

_GIB = 2**30
_FIRST, _AFTERWARDS = "at first", "evaluation"


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of all actors of one role.

    Attributes:
        role: "base scorer".
        cpus: Logical CPUs of each.
        gpus: GPUs of each, where the run uses GPUs.
        phase: Part of the run in which they exist; empty: throughout. Phases follow each other and hand on what they
            held.
        devices: GPUs that hold one model of this role together; more than 1 is tensor parallelism.
    """

    role: str
    replicas: int
    cpus: float
    gpus: float
    phase: str = ""
    devices: int = 1

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
        def held(phase: str) -> float:
            found = [item for item in self.requests if item.phase == phase]
            return sum((item.replicas * float(getattr(item, name)) for item in found), 0.0)

        return held("") + max((held(item.phase) for item in self.requests if item.phase), default=0.0)

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
    config: ClusterConfig, role: str, replicas: int, *, phase: str = "", tensor_parallel: int = 1
) -> ResourceRequest:
    """Returns the request for the engines of one role."""
    return ResourceRequest(role, replicas, *engine_share(config, tensor_parallel), phase, tensor_parallel)


def plan_run(
    config: RunConfig, *, scorers: Sequence[str] = (), workers: int = 0, extras: int = 0, attack_workers: int = 0
) -> ResourcePlan:
    """Plans the resources of a run.

    Args:
        scorers: Frozen models that are scored: "base", "aligned", "student".
        extras: Engines and models that an evaluation holds besides the rollout engines; scorers are gone by then.
        attack_workers: Training workers of the fine-tuning attack.
    """
    cluster, teacher, rollout = config.cluster, config.teacher, config.rollout
    shards = rollout.tensor_parallel
    requests = [engine_request(cluster, "rollout engine", rollout.num_engines, tensor_parallel=shards)]
    requests += [
        engine_request(
            cluster, f"{role} scorer", teacher.replicas, phase=_FIRST, tensor_parallel=teacher.tensor_parallel
        )
        for role in scorers
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

    When a node dies, Ray moves its bundles to nodes with room, or keeps them waiting for one, and starts the actors
    there again.
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
        """Waits until every bundle is placed.

        Args:
            table: Returns needed against available, for the message.

        Raises:
            WaitTimeoutError: Some are not placed in time.
        """
        if not self._group.wait(timeout_s):
            raise WaitTimeoutError(
                f"Ray found no place for {self._count} engines in {timeout_s:g} s (cluster.start_timeout_s).\n"
                f"{table()}\n",
                "Others may hold what is free (`ray status` tells), or cluster.placement asks for more nodes than "
                "there are.",
            )

    def release(self) -> None:
        """Removes the placement group, and ends what still runs in it."""
        remove_placement_group(self._group)


def nodes_of(entries: Sequence[dict[str, Any]]) -> list[Node]:
    """Returns the nodes that are alive, from the entries of `ray.nodes()`."""
    found = [entry["Resources"] for entry in entries if entry["Alive"]]
    return [Node(has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0) / _GIB) for has in found]
