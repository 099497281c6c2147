"""Finds a placement that fits and is fast, or says what does not fit and the smallest change that does."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

from raycomplete.plan.hardware import GIB
from raycomplete.plan.memory import Memory, usable
from raycomplete.plan.request import Layout, Request, engine_memory, loop_of, memories, worker_memory
from raycomplete.plan.step import pace
from raycomplete.runtime.errors import SetupError

WAITING_GOAL = 0.10
_MOST_ENGINES = 64  # of a role: beyond, waiting has another cause
_LARGEST_NODE = 16
_GAIN = 1e-3  # a further engine must shorten the step by this share


def choose_layout(request: Request) -> Layout:
    """The layout with the shortest step on the devices that are there.

    Raises:
        SetupError: Something does not fit; says what, by how much, and what would.
    """
    parallel = {role: smallest_parallel(request, role) for role in request.engines}
    least = sum(parallel.values())
    if request.devices < least + 1:
        return _shared(request, least + 1)
    best: tuple[float, int, Layout] | None = None
    for workers in _worker_counts(request, request.devices - least):
        if worker_memory(request, workers).total > usable(request.hardware):
            continue
        layout = _filled(request, Layout(workers, dict.fromkeys(parallel, 1), parallel))
        found = (pace(loop_of(request, layout)).step, layout.devices, layout)
        if best is None or found[:2] < best[:2]:
            best = found
    if best is None:
        raise _worker_refusal(request, _worker_counts(request, request.devices - least)[-1])
    return best[2]


def smallest_parallel(request: Request, role: str) -> int:
    """Devices of one engine: the fewest that hold it.

    Raises:
        SetupError: Not even all devices of a node do.
    """
    shape = request.shapes["student" if role == "rollout" else role]
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= request.devices_per_node and shape.num_heads % size == 0]
    for size in sizes:
        if engine_memory(request, role, size, 1).total <= usable(request.hardware):
            return size
    found = engine_memory(request, role, sizes[-1], 1)
    raise SetupError(_too_large(request, found, f"{shape.name} over {sizes[-1]} device(s)"), _larger_node(request))


def _larger_node(request: Request) -> str:
    """The fewest devices of a node with which everything fits."""
    for size in range(request.devices_per_node + 1, _LARGEST_NODE + 1):
        with suppress(SetupError):
            layout = choose_layout(replace(request, devices_per_node=size))
            split = ", ".join(f"{role} over {count}" for role, count in layout.parallel.items() if count > 1)
            return f"The smallest change that fits: --gpus-per-node {size} (tensor parallel: {split})."
    return f"No node of up to {_LARGEST_NODE} such devices holds it: take devices with more memory or smaller models."


def engines_for_goal(request: Request, layout: Layout) -> Layout | None:
    """The fewest engines with which the trainer waits at most `WAITING_GOAL` of a step, for as many workers as can."""
    if layout.shared:
        return None
    for workers in reversed(_worker_counts(request, layout.workers)):
        if worker_memory(request, workers).total <= usable(request.hardware):
            start = replace(layout, workers=workers, replicas=dict.fromkeys(layout.replicas, 1))
            goal = _grown_to_goal(request, start)
            if goal is not None:
                return goal
    return None


def _grown_to_goal(request: Request, goal: Layout) -> Layout | None:
    while pace(loop_of(request, goal)).waiting > WAITING_GOAL:
        options = [goal.with_one_more(role) for role in goal.replicas]
        # Roles that are equally slow must grow together.
        options.append(replace(goal, replicas={role: count + 1 for role, count in goal.replicas.items()}))
        better = [option for option in options if _step(request, option) < _step(request, goal) * (1 - _GAIN)]
        if not better or max(goal.replicas.values()) >= _MOST_ENGINES:
            return None
        goal = next(iter(better))
    return _without_spare(request, goal)


def _without_spare(request: Request, goal: Layout) -> Layout:
    """Takes away engines that the goal does not need."""
    for role in goal.replicas:
        while goal.replicas[role] > 1:
            fewer = replace(goal, replicas={**goal.replicas, role: goal.replicas[role] - 1})
            if pace(loop_of(request, fewer)).waiting > WAITING_GOAL:
                break
            goal = fewer
    return goal


def _step(request: Request, layout: Layout) -> float:
    return pace(loop_of(request, layout)).step


def _worker_counts(request: Request, most: int) -> list[int]:
    """Numbers of workers that both batches divide into."""
    both = math.gcd(request.train.anchor_batch, request.train.recovery_batch)
    return [count for count in range(1, most + 1) if both % count == 0]


def _filled(request: Request, layout: Layout) -> Layout:
    """Gives the devices that are left to whichever role shortens the step most."""
    while True:
        left = request.devices - layout.devices
        options = [layout.with_one_more(role) for role in layout.replicas if layout.parallel[role] <= left]
        slow = [role for role in layout.replicas if role != "rollout"]
        if len(slow) == 2:  # equally slow scorers must grow together
            both = layout.with_one_more(slow[0]).with_one_more(slow[1])
            options += [both] if both.devices <= request.devices else []
        better = [option for option in options if _step(request, option) < _step(request, layout) * (1 - _GAIN)]
        if not better:
            return layout
        layout = min(better, key=lambda option: (_step(request, option), option.devices))


def _shared(request: Request, apart: int) -> Layout:
    """Every role on every device."""
    engines = request.engines
    workers = _worker_counts(request, request.devices)[-1]
    layout = Layout(workers, dict.fromkeys(engines, workers), dict.fromkeys(engines, 1), shared=True)
    needed = sum(item.total for item in memories(request, layout))
    if needed <= usable(request.hardware):
        return layout
    worker = worker_memory(request, 1)
    fits_apart = worker.total <= usable(request.hardware)
    most = max(memories(request, layout), key=lambda item: item.total)
    largest = f"{most.role} {most.total / GIB:.1f} GiB"
    raise SetupError(
        f"All roles on one {request.hardware.label} need {needed / GIB:.1f} GiB, "
        f"{(needed - usable(request.hardware)) / GIB:.1f} GiB more than the {usable(request.hardware) / GIB:.1f} GiB "
        f"that can be filled (largest: {largest}).",
        f"The smallest change that fits: {apart} devices, one or more for each role (--gpus-per-node {apart})."
        if fits_apart
        else _remedy(request, 1),
    )


def _worker_refusal(request: Request, workers: int) -> SetupError:
    found = worker_memory(request, workers)
    problem = _too_large(request, found, f"{request.shapes['student'].name} on each of {workers} worker(s)")
    return SetupError(problem, _remedy(request, workers))


def _remedy(request: Request, workers: int) -> str:
    """The first of a list of ever larger changes with which a worker fits."""
    room = usable(request.hardware)
    train = request.train
    ways: list[tuple[str, Request, int]] = []
    if not train.gradient_checkpointing:
        ways.append(("train.gradient_checkpointing=true", request.with_train(gradient_checkpointing=True), workers))
    ways += [
        (f"train.zero_stage={stage}", request.with_train(zero_stage=stage), workers)
        for stage in range(train.zero_stage + 1, 4)
    ]
    for stage in range(train.zero_stage, 4):
        for per_device_batch_size in (train.per_device_batch_size, 8, 4, 2, 1):
            settings = {
                "gradient_checkpointing": True,
                "zero_stage": stage,
                "per_device_batch_size": per_device_batch_size,
            }
            words = f"train.gradient_checkpointing=true train.zero_stage={stage} train.per_device_batch_size={per_device_batch_size}"
            ways.append((words, request.with_train(**settings), workers))
    least = request.with_train(gradient_checkpointing=True, zero_stage=3, per_device_batch_size=1)
    for count in _worker_counts(request, 4096):
        if count > workers:
            words = f"{count} training devices with train.gradient_checkpointing=true train.zero_stage=3 "
            ways.append((f"{words}train.per_device_batch_size=1", least, count))
    for words, changed, count in ways:
        if worker_memory(changed, count).total <= room:
            return f"The smallest change that fits: {words}."
    return "No ZeRO stage fits with these batch sizes: raise them for more workers, or set train.lora_rank."


def _too_large(request: Request, found: Memory, where: str) -> str:
    room = usable(request.hardware)
    largest = max(found.parts, key=lambda name: found.parts[name])
    return (
        f"The {found.role} does not fit: {where} needs {found.total / GIB:.1f} GiB a device, "
        f"{(found.total - room) / GIB:.1f} GiB more than the {room / GIB:.1f} GiB of a {request.hardware.label} that "
        f"can be filled (largest part: {largest}, {found.parts[largest] / GIB:.1f} GiB)."
    )
