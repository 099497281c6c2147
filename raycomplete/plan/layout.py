"""Finds a placement that fits and is fast, or says what does not fit and the smallest change that does.

A step is a loop of events with precedence only (max and plus), so its steady pace is the largest mean weight of a cycle
of that loop. The cycles are few and are written out. Durations count as constant: an event simulation of the same loop
agreed to 1e-13, and with a jitter of 15 % on every duration steps took 0 to 16 % longer, most where queues are full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from raycomplete.plan import engines
from raycomplete.plan.catalogue import GIB
from raycomplete.plan.trainer import train_parts, worker_memory
from raycomplete.plan.workload import FROZEN, Layout, Request
from raycomplete.runtime.errors import SetupError

IN_TURN = "rollouts, scoring and training in turn"
WAITING_GOAL = 0.10
_MOST_ENGINES = 64  # of a role: beyond, waiting has another cause
_LARGEST_NODE = 16
_GAIN = 1e-3  # a further engine must shorten the step by this share


@dataclass(frozen=True)
class Loop:
    """Seconds of one step's parts on the devices that each role has.

    Attributes:
        rollout: Sampling; None off-policy, where samples are there before training.
        sync: One update of the rollout engines' weights, made every `sync_every` steps.
        fetch: Hidden states on their way to the trainer, which waits for them.
        lookahead: Off-policy: steps scored ahead. On-policy: batches rolled out ahead, 0 or 1.
        shared: All roles take turns on the same devices, so nothing overlaps.
    """

    train: float
    scoring: Mapping[str, float]
    rollout: float | None = None
    sync: float = 0.0
    fetch: float = 0.0
    lookahead: int = 1
    sync_every: int = 1
    shared: bool = False


@dataclass(frozen=True)
class Pace:
    """A steady state.

    Attributes:
        step: Seconds from step to step: the largest of `cycles`.
        waiting: Share of them in which the trainer waits for rollouts or scores; updates of weights are no waiting.
        cycles: Seconds a step of each cycle of the loop.
    """

    step: float
    waiting: float
    cycles: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """Name of the longest cycle; of those within rounding, the first."""
        longest = max(self.cycles.values())
        return next(name for name, seconds in self.cycles.items() if seconds >= longest * (1 - 1e-9))


def pace(loop: Loop) -> Pace:
    """The steady state of a loop."""
    found = _cycles(loop)
    step = max(found.values())
    busy = loop.train + (loop.sync / loop.sync_every if loop.rollout is not None else 0.0)
    return Pace(step, 1 - busy / step if step > 0 else 0.0, found)


def _cycles(loop: Loop) -> dict[str, float]:
    """Every cycle that may set the pace, in seconds a step."""
    slowest = max(loop.scoring.values(), default=0.0)
    trainer = loop.fetch + loop.train
    sync = loop.sync / loop.sync_every if loop.rollout is not None else 0.0
    rollout = loop.rollout or 0.0
    if loop.shared:
        return {"everything in turn": trainer + sync + rollout + sum(loop.scoring.values())}
    found = {f"{role} scorer": seconds for role, seconds in loop.scoring.items() if seconds > 0}
    if loop.rollout is None:
        ahead = loop.lookahead + 1
        return found | {"trainer": trainer, "scoring and training in turn": (slowest + trainer) / ahead}
    if loop.lookahead == 0:
        return {IN_TURN: sync + rollout + slowest + trainer}
    in_turn = _in_turn(loop, rollout, slowest, trainer)
    return found | {"trainer": trainer + sync, "rollout engines": rollout + sync, IN_TURN: in_turn}


def _in_turn(loop: Loop, rollout: float, slowest: float, trainer: float) -> float:
    """The longest cycle through rollouts of one step, scoring and training of a later one.

    From the start of step i a path may go on to step i + 1 by training or sampling, or to step i + k by sampling, k - 1
    batches of scoring and training; it pays for the update of the step that it arrives at, where one is due. With an
    update in every step this is (rollout + scoring + training + sync) / 2, if scoring alone is not slower.
    """
    every = loop.sync_every
    edges = [(1, max(trainer, rollout))]
    edges += [(ahead, rollout + (ahead - 1) * slowest + trainer) for ahead in range(2, every + 2)]
    best = 0.0
    for start in range(every):
        last = start + every * (every + 1)
        longest = {start: 0.0}
        for step in range(start, last + 1):
            if step not in longest:
                continue
            if step > start and (step - start) % every == 0:
                best = max(best, longest[step] / (step - start))
            for ahead, weight in edges:
                value = longest[step] + weight + (loop.sync if (step + ahead) % every == 0 else 0.0)
                longest[step + ahead] = max(longest.get(step + ahead, 0.0), value)
    return best


def loop_of(request: Request, layout: Layout) -> Loop:
    """The durations of one step under a layout."""
    config, on_policy = request.config, request.config.rollout.on_policy
    seconds = {
        role: engines.engine_s(request, role, count, layout.parallel[role]) for role, count in layout.replicas.items()
    }
    rollout_devices = layout.replicas.get("rollout", 0) * layout.parallel.get("rollout", 0)
    return Loop(
        train=sum(train_parts(request, layout.workers).values()),
        scoring={role: seconds[role] for role in FROZEN if role in seconds},
        rollout=seconds.get("rollout"),
        sync=engines.sync_s(request, rollout_devices) if on_policy else 0.0,
        fetch=engines.fetch_s(request, layout),
        lookahead=config.rollout.lookahead if on_policy else config.teacher.prefetch,
        sync_every=config.rollout.sync_every if on_policy else 1,
        shared=layout.shared,
    )


def memory_of(request: Request, layout: Layout) -> dict[str, dict[str, float]]:
    """Bytes of one device by role and by what fills them."""
    found = {"training worker": worker_memory(request, layout.workers)}
    for role, count in layout.replicas.items():
        found[engine_name(role)] = engines.engine_memory(request, role, count, layout.parallel[role])
    return found


def engine_name(role: str) -> str:
    """The name of a role's engine on the console."""
    return "rollout engine" if role == "rollout" else f"{role} scorer"


def choose_layout(request: Request) -> Layout:
    """The layout with the shortest step on the devices that are there.

    Raises:
        SetupError: Something does not fit; says what, by how much, and what would.
    """
    parallel = {role: _smallest_parallel(request, role) for role in request.engines}
    left = request.devices - sum(parallel.values())
    if left < 1:
        return _shared(request, sum(parallel.values()) + 1)
    counts = _worker_counts(request, left)
    fitting = [count for count in counts if _fits(request, worker_memory(request, count))]
    if not fitting:
        where = f"{request.shapes['student'].name} on each of {counts[-1]} worker(s)"
        problem = _too_large(request, "training worker", worker_memory(request, counts[-1]), where)
        raise SetupError(problem, _remedy(request, counts[-1]))
    layouts = [_filled(request, Layout(count, dict.fromkeys(parallel, 1), parallel)) for count in fitting]
    return min(layouts, key=lambda layout: (_step(request, layout), layout.devices))


def _smallest_parallel(request: Request, role: str) -> int:
    """The fewest devices that hold one engine of a role."""
    shape = request.shapes["student" if role == "rollout" else role]
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= request.devices_per_node and shape.num_heads % size == 0]
    for size in sizes:
        found = engines.engine_memory(request, role, 1, size)
        if _fits(request, found):
            return size
    where = f"{shape.name} over {sizes[-1]} device(s)"
    raise SetupError(_too_large(request, engine_name(role), found, where), _larger_node(request))


def _larger_node(request: Request) -> str:
    """The fewest devices of a node with which everything fits."""
    for size in range(request.devices_per_node + 1, _LARGEST_NODE + 1):
        with suppress(SetupError):
            layout = choose_layout(replace(request, devices_per_node=size))
            split = ", ".join(f"{role} over {count}" for role, count in layout.parallel.items() if count > 1)
            return f"The smallest change that fits: --gpus-per-node {size} (tensor parallel: {split})."
    return f"No node of up to {_LARGEST_NODE} such devices holds it: take devices with more memory or smaller models."


def _filled(request: Request, layout: Layout) -> Layout:
    """Gives the devices that are left to whichever role shortens the step most."""
    while better := [item for item in _faster(request, layout, FROZEN) if item.devices <= request.devices]:
        layout = min(better, key=lambda option: (_step(request, option), option.devices))
    return layout


def _faster(request: Request, layout: Layout, together: tuple[str, ...]) -> list[Layout]:
    """Layouts with a further engine of one role, or of equally slow roles together, that shorten the step."""
    options = [layout.with_engines(role) for role in layout.replicas]
    grown = {role: count + (role in together) for role, count in layout.replicas.items()}
    step = _step(request, layout) * (1 - _GAIN)
    return [option for option in (*options, replace(layout, replicas=grown)) if _step(request, option) < step]


def engines_for_goal(request: Request, layout: Layout) -> Layout | None:
    """The fewest engines with which the trainer waits at most `WAITING_GOAL` of a step, for as many workers as can."""
    for workers in () if layout.shared else reversed(_worker_counts(request, layout.workers)):
        goal = replace(layout, workers=workers, replicas=dict.fromkeys(layout.replicas, 1))
        if _fits(request, worker_memory(request, workers)) and (found := _grown_to_goal(request, goal)):
            return found
    return None


def _grown_to_goal(request: Request, goal: Layout) -> Layout | None:
    """Adds engines that shorten the step until the trainer waits little, and takes away those that are not needed."""
    while not _waits_little(request, goal):
        better = _faster(request, goal, tuple(goal.replicas))
        if not better or max(goal.replicas.values()) >= _MOST_ENGINES:
            return None
        goal = better[0]
    for role in goal.replicas:
        while goal.replicas[role] > 1 and _waits_little(request, goal.with_engines(role, -1)):
            goal = goal.with_engines(role, -1)
    return goal


def _waits_little(request: Request, layout: Layout) -> bool:
    return pace(loop_of(request, layout)).waiting <= WAITING_GOAL


def _step(request: Request, layout: Layout) -> float:
    return pace(loop_of(request, layout)).step


def _worker_counts(request: Request, most: int) -> list[int]:
    """Numbers of workers that both batches divide into."""
    both = math.gcd(request.config.method.anchor_batch_size, request.config.method.recovery_batch_size)
    return [count for count in range(1, most + 1) if both % count == 0]


def _fits(request: Request, parts: Mapping[str, float]) -> bool:
    return sum(parts.values()) <= request.usable_bytes


def _shared(request: Request, apart: int) -> Layout:
    """Every role on every device, or a refusal that names the number of devices on which each has its own."""
    workers = _worker_counts(request, request.devices)[-1]
    layout = Layout(workers, dict.fromkeys(request.engines, workers), dict.fromkeys(request.engines, 1), shared=True)
    totals = {role: sum(parts.values()) for role, parts in memory_of(request, layout).items()}
    if _fits(request, totals):
        return layout
    needed, room, largest = sum(totals.values()), request.usable_bytes, max(totals, key=lambda role: totals[role])
    raise SetupError(
        f"All roles on one {request.hardware.label} need {needed / GIB:.1f} GiB, {(needed - room) / GIB:.1f} GiB more "
        f"than the {room / GIB:.1f} GiB that can be filled (largest: {largest} {totals[largest] / GIB:.1f} GiB).",
        f"The smallest change that fits: {apart} devices, one or more for each role (--gpus-per-node {apart})."
        if _fits(request, worker_memory(request, 1))
        else _remedy(request, 1),
    )


def _remedy(request: Request, workers: int) -> str:
    """The first of a list of ever larger changes with which a worker fits."""
    train, method = request.train, request.config.method
    again: dict[str, Any] = {} if method.perturbs_layers else {"gradient_checkpointing": True}
    deepest = 2 if method.moves_suffixes or method.perturbs_layers else 3  # an adversary is refused under ZeRO-3
    stages, sizes = range(train.zero_stage, deepest + 1), (train.per_device_batch_size, 8, 4, 2, 1)
    steps: list[dict[str, Any]] = [] if train.gradient_checkpointing or not again else [again]
    steps += [{"zero_stage": stage} for stage in stages[1:]]
    steps += [again | {"zero_stage": stage, "per_device_batch_size": size} for stage in stages for size in sizes]
    changes = [(change, workers) for change in steps]
    least = again | {"zero_stage": deepest, "per_device_batch_size": 1}
    changes += [(least, count) for count in _worker_counts(request, 4096) if count > workers]
    for change, count in changes:
        if _fits(request, worker_memory(request.with_train(**change), count)):
            words = " ".join(f"train.{key}={str(value).lower()}" for key, value in change.items())
            devices = "" if count == workers else f"{count} training devices with "
            return f"The smallest change that fits: {devices}{words}."
    return "No ZeRO stage fits with these batch sizes: raise them for more workers, or set train.lora_rank."


def _too_large(request: Request, role: str, parts: Mapping[str, float], where: str) -> str:
    room, total = request.usable_bytes, sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"The {role} does not fit: {where} needs {total / GIB:.1f} GiB a device, {(total - room) / GIB:.1f} GiB more "
        f"than the {room / GIB:.1f} GiB of a {request.hardware.label} that can be filled (largest part: {largest}, "
        f"{parts[largest] / GIB:.1f} GiB)."
    )
