"""The whole plan: layout, memory, rates, pace, cost, and everything that it assumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raycomplete.plan import speed
from raycomplete.plan.assumptions import assumptions
from raycomplete.plan.layout import choose_layout, engines_for_goal
from raycomplete.plan.memory import Memory, usable
from raycomplete.plan.request import Layout, Request, loop_of, memories, train_parts
from raycomplete.plan.simulate import Simulated, simulate
from raycomplete.plan.step import Loop, Pace, pace
from raycomplete.plan.workload import Workload

JITTER = 0.15


@dataclass(frozen=True)
class Rate:
    """Speed of one role with all its devices.

    Attributes:
        role: Whose.
        devices: Of all its processes.
        tokens: In one step.
        seconds: That it works in one step.
        busy: Share of the step.
    """

    role: str
    devices: int
    tokens: float
    seconds: float
    busy: float

    @property
    def tokens_per_s(self) -> float:
        """While it works."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Estimate:
    """A plan of a run.

    Attributes:
        request: What was asked.
        layout: Who gets which devices.
        memory: Of one device, by role.
        work: One step.
        loop: Durations of its parts.
        train_parts: Seconds of the optimizer step by what takes them.
        pace: Closed form.
        simulated: The same loop played event by event, without jitter.
        jittered: The same with jitter of `JITTER`.
        goal: Fewest engines for little waiting, or None if no number of them does.
    """

    request: Request
    layout: Layout
    memory: list[Memory]
    work: Workload
    loop: Loop
    train_parts: dict[str, float]
    pace: Pace
    simulated: Simulated
    jittered: Simulated
    goal: Layout | None

    @property
    def price(self) -> float:
        """Of one device and hour."""
        given = self.request.price
        return self.request.hardware.example_price if given is None else given

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.request.train.steps * self.pace.step / 3600

    @property
    def cost(self) -> float:
        """Of all steps, on all devices that are rented."""
        return self.hours * self.request.devices * self.price

    @property
    def cost_per_million_tokens(self) -> float:
        """Of trained tokens."""
        return self.cost / (self.request.train.steps * self.work.trained_tokens) * 1e6

    @property
    def rates(self) -> list[Rate]:
        """By role."""
        layout, loop, work, step = self.layout, self.loop, self.work, self.pace.step

        def rate(role: str, devices: int, tokens: float, seconds: float) -> Rate:
            return Rate(role, devices, tokens, seconds, seconds / step)

        def devices(role: str) -> int:
            return layout.devices if layout.shared else layout.replicas[role] * layout.parallel[role]

        found = [rate("training workers", layout.workers, work.trained_tokens, loop.train)]
        for role, seconds in loop.scoring.items():
            found.append(
                rate(f"{role} scorers", devices(role), sum(item.tokens for item in work.scored[role]), seconds)
            )
        if loop.rollout is not None and work.rollouts is not None:
            found.append(rate("rollout engines", devices("rollout"), work.rollouts.rows, loop.rollout))
        return found

    @property
    def payload_bytes(self) -> dict[str, float]:
        """Hidden states of a step by frozen model."""
        dtype, shapes = self.request.config.models.dtype, self.request.shapes
        return {
            role: self.work.payload_rows(role) * shapes[role].hidden_bytes_per_token(dtype)
            for role in self.loop.scoring
        }

    @property
    def sync_bytes(self) -> float:
        """Of one update of the engines' weights; 0 off-policy."""
        config = self.request.config
        if not config.rollout.on_policy:
            return 0.0
        return speed.sync_bytes(self.request.shapes["student"], config.train, config.models.dtype)

    @property
    def update_s(self) -> float:
        """Seconds of updates of the engines' weights in a mean step."""
        return self.loop.sync / self.loop.sync_every

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and tokens."""
        request = self.request
        return {
            "hardware": asdict(request.hardware),
            "nodes": request.nodes,
            "devices_per_node": request.devices_per_node,
            "models": {
                role: asdict(shape) | {"parameters": shape.num_parameters} for role, shape in request.shapes.items()
            },
            "layout": asdict(self.layout) | {"devices": self.layout.devices},
            "memory": {item.role: item.parts | {"total": item.total} for item in self.memory},
            "memory_usable": usable(request.hardware),
            "step": asdict(self.work) | {"trained_tokens": self.work.trained_tokens},
            "rates": {item.role: asdict(item) | {"tokens_per_s": item.tokens_per_s} for item in self.rates},
            "train_parts_s": self.train_parts,
            "loop_s": asdict(self.loop),
            "payload_bytes": self.payload_bytes,
            "payload_bytes_per_s": sum(self.payload_bytes.values()) / self.pace.step,
            "sync_bytes": self.sync_bytes,
            "sync_bytes_per_s": self.sync_bytes / request.config.rollout.sync_every / self.pace.step,
            "step_s": self.pace.step,
            "waiting_fraction": self.pace.waiting,
            "cycles_s": self.pace.cycles,
            "bottleneck": self.pace.bottleneck,
            "simulated": asdict(self.simulated),
            "simulated_with_jitter": asdict(self.jittered) | {"jitter": JITTER},
            "engines_for_little_waiting": None
            if self.goal is None
            else asdict(self.goal) | {"devices": self.goal.devices},
            "hours": self.hours,
            "price_per_device_hour": self.price,
            "cost": self.cost,
            "cost_per_million_trained_tokens": self.cost_per_million_tokens,
            "trained_tokens_per_s": self.work.trained_tokens / self.pace.step,
            "assumptions": assumptions(request, shared=self.layout.shared),
        }


def make_plan(request: Request) -> Estimate:
    """Plans a run.

    Raises:
        SetupError: It does not fit.
    """
    layout = choose_layout(request)
    loop = loop_of(request, layout)
    replicas = dict(layout.replicas)
    return Estimate(
        request=request,
        layout=layout,
        memory=memories(request, layout),
        work=request.workload(layout.workers),
        loop=loop,
        train_parts=train_parts(request, layout.workers),
        pace=pace(loop),
        simulated=simulate(loop, replicas=replicas),
        jittered=simulate(loop, replicas=replicas, jitter=JITTER, seed=request.train.seed),
        goal=engines_for_goal(request, layout),
    )
