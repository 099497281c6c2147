"""What a plan is asked for, and the durations and memory of one way to place it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from raycomplete.config import RunConfig, TrainConfig
from raycomplete.plan import memory, speed
from raycomplete.plan.hardware import Hardware
from raycomplete.plan.memory import Memory
from raycomplete.plan.shapes import ModelShape
from raycomplete.plan.speed import Factors, Network
from raycomplete.plan.step import Loop
from raycomplete.plan.workload import Workload

FROZEN = ("aligned", "base")


@dataclass(frozen=True)
class Request:
    """Models, hardware and run file of a plan.

    Attributes:
        config: Run file.
        shapes: Of student, aligned and base.
        hardware: Of every device.
        nodes: Machines.
        devices_per_node: GPUs of one, or 1 on a CPU machine.
        price: Of one device and hour; None takes the hardware's example.
        prompt_tokens: Mean tokens of a prompt with its chat template.
        network: Between nodes.
        factors: What no data sheet says.
    """

    config: RunConfig
    shapes: dict[str, ModelShape]
    hardware: Hardware
    nodes: int = 1
    devices_per_node: int = 1
    price: float | None = None
    prompt_tokens: float = 64.0
    network: Network = field(default_factory=lambda: Network(6.25e9))
    factors: Factors = field(default_factory=Factors)

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def train(self) -> TrainConfig:
        """The run file's trainer."""
        return self.config.train

    @property
    def engines(self) -> tuple[str, ...]:
        """Roles on engines that have work in a step."""
        work = self.workload(1)
        roles = [role for role in FROZEN if work.scored[role]]
        return (*roles, *(["rollout"] if work.rollouts is not None else []))

    def workload(self, workers: int) -> Workload:
        """One optimizer step."""
        return Workload.of_run(self.config, self.prompt_tokens, workers)

    def with_train(self, **changes: object) -> Request:
        """The same with other settings of the trainer."""
        train = self.config.train.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"train": train}))


@dataclass(frozen=True)
class Layout:
    """Who gets which devices.

    Attributes:
        workers: Data-parallel training workers, one device each.
        replicas: Engines by role.
        parallel: Devices of one engine by role (tensor parallel).
        shared: Every device holds a worker and an engine of each role, which take turns.
    """

    workers: int
    replicas: dict[str, int]
    parallel: dict[str, int]
    shared: bool = False

    @property
    def devices(self) -> int:
        """Devices that are used."""
        if self.shared:
            return self.workers
        return self.workers + sum(count * self.parallel[role] for role, count in self.replicas.items())

    def with_one_more(self, role: str) -> Layout:
        """One more engine of a role."""
        return replace(self, replicas={**self.replicas, role: self.replicas[role] + 1})


def engine_memory(request: Request, role: str, parallel: int, replicas: int) -> Memory:
    """One device of an engine."""
    dtype, batched = request.config.models.dtype, request.config.teacher.max_num_batched_tokens
    if role == "rollout":
        rollouts = request.workload(1).rollouts
        assert rollouts is not None
        shape = request.shapes["student"]
        found = memory.rollout_memory(shape, dtype, rollouts, batched, replicas, parallel)
    else:
        found = memory.pooling_memory(request.shapes[role], dtype, batched, parallel)
    return replace(found, role="rollout engine" if role == "rollout" else f"{role} scorer")


def worker_memory(request: Request, workers: int) -> Memory:
    """One training worker."""
    dtype, is_gpu = request.config.models.dtype, request.hardware.is_gpu
    work = request.workload(workers)
    return memory.worker_memory(request.train, work, request.shapes, dtype, workers, is_gpu=is_gpu)


def memories(request: Request, layout: Layout) -> list[Memory]:
    """Of every role."""
    engines = [engine_memory(request, role, layout.parallel[role], count) for role, count in layout.replicas.items()]
    return [worker_memory(request, layout.workers), *engines]


def train_parts(request: Request, workers: int) -> dict[str, float]:
    """Seconds of an optimizer step by what takes them."""
    return speed.train_s(
        request.train,
        request.hardware,
        request.factors,
        request.workload(workers),
        request.shapes,
        dtype=request.config.models.dtype,
        workers=workers,
        gpus_per_node=request.devices_per_node,
    )


def engine_s(request: Request, role: str, replicas: int, parallel: int) -> float:
    """Seconds of a step's work of a role, split over its engines."""
    config, work = request.config, request.workload(1)
    dtype, batched = config.models.dtype, config.teacher.max_num_batched_tokens
    hardware, factors = request.hardware, request.factors
    if role == "rollout":
        assert work.rollouts is not None
        return speed.rollout_s(
            request.shapes["student"],
            hardware,
            factors,
            work.rollouts,
            dtype=dtype,
            engines=replicas,
            parallel=parallel,
            batched_tokens=batched,
        )
    groups = tuple(replace(item, count=item.count / replicas) for item in work.scored[role])
    return speed.scoring_s(
        request.shapes[role], hardware, factors, groups, dtype=dtype, parallel=parallel, batched_tokens=batched
    )


def loop_of(request: Request, layout: Layout) -> Loop:
    """The durations of one step under a layout."""
    config, shapes, per_node = request.config, request.shapes, request.devices_per_node
    dtype, on_policy = config.models.dtype, config.rollout.on_policy
    work = request.workload(layout.workers)
    train_nodes = math.ceil(layout.workers / per_node)
    seconds = {role: engine_s(request, role, count, layout.parallel[role]) for role, count in layout.replicas.items()}
    sync = 0.0
    if on_policy:
        moved = speed.sync_bytes(shapes["student"], request.train, dtype)
        engine_devices = layout.replicas["rollout"] * layout.parallel["rollout"]
        nodes = math.ceil(engine_devices / per_node)
        sync = speed.sync_s(
            moved, request.hardware, request.factors, request.network, engine_nodes=nodes, nodes=request.nodes
        )
    return Loop(
        train=sum(train_parts(request, layout.workers).values()),
        scoring={role: seconds[role] for role in FROZEN if role in seconds},
        rollout=seconds.get("rollout"),
        sync=sync,
        fetch=speed.fetch_s(work, shapes, dtype, request.network, request.nodes, train_nodes),
        lookahead=config.rollout.lookahead if on_policy else config.teacher.prefetch,
        sync_every=config.rollout.sync_every if on_policy else 1,
        shared=layout.shared,
    )
