"""`raycomplete plan`: reads shapes of the run file's models, plans, and prints tables by role."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from raycomplete.config import RunConfig
from raycomplete.plan.assumptions import assumptions
from raycomplete.plan.estimate import JITTER, Estimate, make_plan
from raycomplete.plan.hardware import GIB, find_hardware
from raycomplete.plan.layout import WAITING_GOAL
from raycomplete.plan.memory import usable
from raycomplete.plan.request import Request
from raycomplete.plan.shapes import ModelShape, preset, preset_of_hub, shape_from_config
from raycomplete.plan.speed import Network
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class PlanOptions:
    """What the command line adds to a run file.

    Attributes:
        hardware: A known name, or a file that `--measure` wrote.
        nodes: Machines.
        devices_per_node: GPUs of one.
        student: Name of a shape, or a folder with a config.json; the run file's student when absent.
        teacher: The same for both frozen models.
        price: Of one device and hour.
        prompt_tokens: Mean tokens of a prompt.
        network_gbit: Of one node, for Ray's objects.
    """

    hardware: str = "h100"
    nodes: int = 1
    devices_per_node: int = 1
    student: str | None = None
    teacher: str | None = None
    price: float | None = None
    prompt_tokens: float = 64.0
    network_gbit: float = 50.0

    def __post_init__(self) -> None:
        for flag, value in (
            ("--nodes", self.nodes),
            ("--gpus-per-node", self.devices_per_node),
            ("--prompt-tokens", self.prompt_tokens),
            ("--network-gbit", self.network_gbit),
        ):
            if value <= 0:
                raise ConfigError(f"{flag} must be positive, got {value}.")
        if self.price is not None and self.price < 0:
            raise ConfigError(f"The price must not be negative, got {self.price}.")


def plan(config: RunConfig, options: PlanOptions, *, as_json: bool = False, console: Console | None = None) -> Estimate:
    """Plans the run of a run file and prints it.

    Args:
        config: Run file.
        options: Hardware, and models in place of the run file's.
        as_json: Prints JSON instead of tables.
        console: Where it goes.

    Raises:
        ConfigError: Hardware or a model is not known.
        CheckpointError: A checkpoint's config.json is missing or of no known family.
        SetupError: Something does not fit; says the smallest change that does.
    """
    console = console or Console()
    estimate = make_plan(request_of(config, options))
    if as_json:
        console.rich.print_json(json.dumps(estimate.to_json()))
    else:
        show(estimate, console)
    return estimate


def request_of(config: RunConfig, options: PlanOptions) -> Request:
    """Run file and options as the formulas want them."""
    return Request(
        config=config,
        shapes=shapes_of(config, options),
        hardware=find_hardware(options.hardware),
        nodes=options.nodes,
        devices_per_node=options.devices_per_node,
        price=options.price,
        prompt_tokens=options.prompt_tokens,
        network=Network(options.network_gbit * 1e9 / 8),
    )


def shapes_of(config: RunConfig, options: PlanOptions) -> dict[str, ModelShape]:
    """Shapes of student, aligned and base."""
    models = config.models
    base = _named(options.teacher) if options.teacher else _of_checkpoint(models.base, "base")
    if options.teacher:
        aligned = base
    elif config.align.output is not None and not Path(models.aligned).is_dir() and _is_output(config):
        aligned = base  # `raycomplete align` has not made the twin yet, and it is made from base
    else:
        aligned = _of_checkpoint(models.aligned, "aligned")
    if options.student:
        student = _named(options.student)
    else:
        student = aligned if models.student is None else _of_checkpoint(models.student, "student")
    return {"student": student, "aligned": aligned, "base": base}


def _is_output(config: RunConfig) -> bool:
    return config.align.output is not None and Path(config.models.aligned) == config.align.output


def _named(name: str) -> ModelShape:
    """--student and --teacher: a folder, a config.json, or a known name."""
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return _of_config_file(path if path.suffix == ".json" else path / "config.json", name)
    return preset(name)


def _of_checkpoint(spec: str, role: str) -> ModelShape:
    """Reads config.json of a checkpoint of the run file; weights are neither read nor downloaded."""
    scheme, _, rest = spec.partition(":")
    if scheme == "hub" and rest:
        found = preset_of_hub(rest)
        if found is None:
            flag = "--student" if role == "student" else "--teacher"
            raise CheckpointError(
                f"models.{role}: the shape of {spec} is not known, and a plan downloads nothing.",
                f"Give {flag} with a folder that holds its config.json, or the name of a model of its size.",
            )
        return found
    if scheme == "organism" and rest:
        from raycomplete.data.organism.locate import OrganismRole, checkpoint_path

        return _of_config_file(checkpoint_path(cast(OrganismRole, rest)) / "config.json", spec)
    path = Path(spec).expanduser()
    if not path.is_dir():  # a GGUF file or a package: converted as training would convert it
        from raycomplete.data.checkpoints import resolve_checkpoint

        path = resolve_checkpoint(spec, role=role)
    return _of_config_file(path / "config.json", spec)


def _of_config_file(path: Path, name: str) -> ModelShape:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a model's config.json.", "Check the path.") from error
    return shape_from_config(content, name)


def show(estimate: Estimate, console: Console) -> None:
    """Tables by role, the bottleneck, and what was assumed."""
    request, layout = estimate.request, estimate.layout
    models = ", ".join(f"{role} {shape.name} ({_billions(shape)})" for role, shape in request.shapes.items())
    console.rich.print(f"{models}\n{request.nodes} x {request.devices_per_node} {request.hardware.label}\n")
    console.table("Placement and speed of one step", _speed_rows(estimate))
    console.table(
        f"Memory of one device, GiB ({usable(request.hardware) / GIB:.1f} can be filled)", _memory_rows(estimate)
    )
    step, jittered = estimate.pace.step, estimate.jittered.pace
    noisy = f"with {JITTER:.0%} jitter {_seconds(jittered.step)}, waiting {jittered.waiting:.0%}"
    console.panel(
        [
            ("trained tokens", f"{estimate.work.trained_tokens:,.0f} a step"),
            ("optimizer step", _parts(estimate.train_parts)),
            ("hidden states", _transfer(sum(estimate.payload_bytes.values()), step)),
            *([("weights to engines", _weights(estimate))] if estimate.sync_bytes else []),
            ("step", f"{_seconds(step)}, of which the trainer waits {estimate.pace.waiting:.0%} for engines"),
            ("simulated", f"{_seconds(estimate.simulated.pace.step)}; {noisy}"),
            ("speed", f"{estimate.work.trained_tokens / step:,.0f} trained tokens/s"),
            ("cost", f"{estimate.cost_per_million_tokens:.3g} per million trained tokens"),
            ("whole run", f"{request.train.steps} steps, {_hours(estimate.hours)}, {estimate.cost:,.3g}"),
        ]
    )
    console.rich.print(f"\n{bottleneck(estimate)}\n", soft_wrap=True, highlight=False)
    console.rich.print("Assumed:")
    for line in assumptions(request, shared=layout.shared):
        console.rich.print(f"  - {line}", soft_wrap=True, highlight=False)


def bottleneck(estimate: Estimate) -> str:
    """What sets the pace, and what little waiting would take."""
    layout = estimate.layout
    sentence = f"Bottleneck: {estimate.pace.bottleneck}, {_seconds(estimate.pace.step)} a step."
    if estimate.update_s > max(estimate.loop.train, estimate.loop.rollout or 0.0):
        sentence += (
            f" Updates of the engines' weights take {_seconds(estimate.update_s)} of it: a larger rollout.sync_every "
            "(with rollout.max_staleness) or train.lora_rank would shrink them."
        )
    if layout.shared:
        return f"{sentence} Each role on devices of its own would overlap them."
    if estimate.goal is None:
        return (
            f"{sentence} No number of engines brings waiting to {WAITING_GOAL:.0%}: host time of engines and transfers "
            "alone take longer."
        )
    goal = estimate.goal
    engines = ", ".join(f"{count} {_engine_name(role)}" for role, count in goal.replicas.items())
    if estimate.pace.waiting <= WAITING_GOAL:
        return f"{sentence} The trainer waits little; {engines} would be enough for {goal.workers} worker(s)."
    return (
        f"{sentence} Waiting falls to {WAITING_GOAL:.0%} at {goal.workers} training worker(s) with {engines}: "
        f"{goal.devices} devices in all."
    )


def _engine_name(role: str) -> str:
    return "rollout engine(s)" if role == "rollout" else f"{role} scorer(s)"


def _speed_rows(estimate: Estimate) -> list[list[str]]:
    layout = estimate.layout
    rows = [["role", "processes", "devices each", "tokens a step", "tokens/s", "seconds", "busy"]]
    names = ["", *estimate.loop.scoring, *(["rollout"] if estimate.loop.rollout is not None else [])]
    for name, rate in zip(names, estimate.rates, strict=True):
        processes, each = (layout.replicas[name], layout.parallel[name]) if name else (layout.workers, 1)
        rows.append(
            [
                rate.role,
                str(processes),
                str(each),
                f"{rate.tokens:,.0f}",
                f"{rate.tokens_per_s:,.0f}",
                _seconds(rate.seconds),
                f"{rate.busy:.0%}",
            ]
        )
    return rows


def _memory_rows(estimate: Estimate) -> list[list[str]]:
    names = list(dict.fromkeys(name for item in estimate.memory for name in item.parts))
    return [
        ["role", *names, "total"],
        *(
            [item.role, *(_gib(item.parts[name]) if name in item.parts else "" for name in names), _gib(item.total)]
            for item in estimate.memory
        ),
    ]


def _gib(value: float) -> str:
    return f"{value / GIB:.3g}"


def _billions(shape: ModelShape) -> str:
    count = shape.num_parameters
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {_seconds(value)}" for name, value in seconds.items() if value > 0)


def _transfer(moved: float, step: float) -> str:
    return f"{moved / 1e6:,.3g} MB a step, {moved / step / 1e6:,.3g} MB/s through the object store"


def _weights(estimate: Estimate) -> str:
    every = estimate.request.config.rollout.sync_every
    rate = estimate.sync_bytes / every / estimate.pace.step
    return f"{estimate.sync_bytes / 1e9:,.3g} GB every {every} step(s), {rate / 1e9:,.3g} GB/s"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _hours(value: float) -> str:
    return f"{value:.2f} hours" if value >= 1 else f"{value * 60:.1f} minutes"
