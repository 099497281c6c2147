"""The whole plan: layout, memory, rates, pace, cost, and everything that it assumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raycomplete.plan import engines
from raycomplete.plan.catalogue import GIB
from raycomplete.plan.layout import (
    WAITING_GOAL,
    Loop,
    Pace,
    choose_layout,
    engine_name,
    engines_for_goal,
    loop_of,
    memory_of,
    pace,
)
from raycomplete.plan.trainer import chunk_rows, train_parts
from raycomplete.plan.workload import RESERVED_SHARE, Layout, Request, Workload


@dataclass(frozen=True)
class Estimate:
    """A plan of a run; parts of memory and of the optimizer step by name, payload by frozen model.

    Attributes:
        goal: Fewest engines for little waiting, or None if no number of them does.
        price: Price of one device and hour.
        cost: Cost of all steps, on all devices that are rented.
    """

    request: Request
    layout: Layout
    goal: Layout | None
    work: Workload
    loop: Loop
    pace: Pace
    train_parts: dict[str, float]
    memory: dict[str, dict[str, float]]
    payload_bytes: dict[str, float]
    sync_bytes: float
    price: float
    hours: float
    cost: float

    @property
    def cost_per_million_tokens(self) -> float:
        """Cost of a million trained tokens."""
        return self.cost / (self.request.train.steps * self.work.trained_tokens) * 1e6

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Processes, devices of all of them, tokens, seconds and share of a step by role, training workers first."""
        layout, work = self.layout, self.work
        tokens = {role: sum(item.tokens for item in groups) for role, groups in work.scored.items()}
        tokens["rollout"] = work.rollouts.rows if work.rollouts is not None else 0.0
        seconds = {**self.loop.scoring, "rollout": self.loop.rollout or 0.0}
        found = {"training workers": (layout.workers, layout.workers, work.trained_tokens, self.loop.train)}
        for role, count in layout.replicas.items():
            devices = layout.devices if layout.shared else count * layout.parallel[role]
            found[f"{engine_name(role)}s"] = (count, devices, tokens[role], seconds[role])
        names = ("processes", "devices", "tokens", "seconds", "tokens_per_s", "busy")
        speeds = {name: (it[2] / it[3] if it[3] else 0.0, it[3] / self.pace.step) for name, it in found.items()}
        return {name: dict(zip(names, (*it, *speeds[name]), strict=True)) for name, it in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and tokens."""
        request, layouts = self.request, {"layout": self.layout, "engines_for_little_waiting": self.goal}
        shapes, step = request.shapes.items(), self.pace.step
        return {
            "hardware": asdict(request.hardware),
            "nodes": request.nodes,
            "devices_per_node": request.devices_per_node,
            "models": {role: asdict(shape) | {"parameters": shape.num_parameters} for role, shape in shapes},
            **{name: found and asdict(found) | {"devices": found.devices} for name, found in layouts.items()},
            "memory": {role: parts | {"total": sum(parts.values())} for role, parts in self.memory.items()},
            "memory_usable": request.usable_bytes,
            "step": asdict(self.work) | {"trained_tokens": self.work.trained_tokens},
            "rates": self.rates,
            "train_parts_s": self.train_parts,
            "loop_s": asdict(self.loop),
            "payload_bytes": self.payload_bytes,
            "payload_bytes_per_s": sum(self.payload_bytes.values()) / step,
            "sync_bytes": self.sync_bytes,
            "sync_bytes_per_s": self.sync_bytes / request.config.rollout.sync_every / step,
            "step_s": step,
            "waiting_fraction": self.pace.waiting,
            "cycles_s": self.pace.cycles,
            "bottleneck": self.pace.bottleneck,
            "hours": self.hours,
            "price_per_device_hour": self.price,
            "cost": self.cost,
            "cost_per_million_trained_tokens": self.cost_per_million_tokens,
            "trained_tokens_per_s": self.work.trained_tokens / step,
            "assumptions": self.assumptions(),
        }

    def _why_dtype(self) -> str:
        """Says what `models.dtype: auto` is, and why."""
        device = self.request.hardware
        ratio = device.bfloat16_flops / device.float32_flops
        return f"models.dtype: auto is {self.request.dtype}: in bfloat16 products are {ratio:.2g} times as fast here."

    def assumptions(self) -> list[str]:
        """Every number of the plan that neither the run file nor the command line gave, in sentences."""
        request, config, device = self.request, self.request.config, self.request.hardware
        rows = chunk_rows(config.train, request.shapes["student"].vocab_size, request.dtype, is_gpu=device.is_gpu)
        offer = "as given" if request.price is not None else "an example and no offer; give --price-per-gpu-hour"
        beside = (
            "Not counted on a CPU: an idle rollout engine of a small model, the driver with Ray (1.2 GiB), scores and "
            "samples in memory, and gaps between tensors of many sizes, by which a worker grows (2 to 4 GiB in 160 "
            "steps of SmolLM2-135M)."
        )
        pushed = (
            "Weights go through the object store, from one host to each node with rollout engines in turn: where NCCL "
            "or CUDA IPC carries them (rollout.weight_transfer), an update takes less. Judging takes no time."
        )
        return [
            f"Hardware: {device.label}, {device.memory_bytes / GIB:.0f} GiB, {device.flops(request.dtype) / 1e12:.3g} "
            f"TFLOP/s in {request.dtype}, {device.memory_bandwidth / 1e9:,.4g} GB/s of memory; from {device.source}.",
            *([] if config.models.dtype != "auto" else [self._why_dtype()]),
            f"{RESERVED_SHARE:.0%} of each device stays free for context, fragmentation and communication buffers.",
            *([] if device.is_gpu else [beside]),
            f"Products reach {device.product_share:.0%} of the peak in engines, {device.train_share:.0%} in training "
            f"and {device.loss_share:.0%} in the loss. Links, copies and host times are under `hardware` in --json.",
            f"Prompts have {request.prompt_tokens:.0f} tokens on average (--prompt-tokens); responses are as long as "
            "the run file allows; depths average the middle of their range.",
            "Every sequence is read anew: no hits in the score cache (off-policy runs have them from epoch two on).",
            f"The loss keeps {rows} rows of logits at a time; full attention without sliding windows; ZeRO's "
            "collectives are not hidden behind the backward pass.",
            f"Engines run at most {engines.MAX_SEQUENCES} sequences and {config.teacher.max_num_batched_tokens} tokens "
            "a pass.",
            "Not counted: start of engines, sampling before training, evaluation, checkpoints, validation, and jitter, "
            "which costs most where queues are full (up to 16% at a spread of 15%).",
            *([pushed] if config.rollout.on_policy else []),
            f"Price: {self.price:.2f} per device and hour, {offer}. All rented devices are paid for, used or not.",
            "All roles take turns on the same devices: their times add up."
            if self.layout.shared
            else "Each role has devices of its own, and batches split evenly over its engines (several engines and "
            f"tensor parallelism are part of the plan). Little waiting means at most {WAITING_GOAL:.0%} of a step.",
        ]


def make_plan(request: Request) -> Estimate:
    """Plans a run.

    Raises:
        SetupError: The run does not fit.
    """
    layout = choose_layout(request)
    loop, work = loop_of(request, layout), request.workload(layout.workers)
    price = request.hardware.example_price if request.price is None else request.price
    hours = request.train.steps * pace(loop).step / 3600
    return Estimate(
        request=request,
        layout=layout,
        goal=engines_for_goal(request, layout),
        work=work,
        loop=loop,
        pace=pace(loop),
        train_parts=train_parts(request, layout.workers),
        memory=memory_of(request, layout),
        payload_bytes=engines.payload_bytes(request, work),
        sync_bytes=engines.sync_bytes(request),
        price=price,
        hours=hours,
        cost=hours * request.devices * price,
    )
