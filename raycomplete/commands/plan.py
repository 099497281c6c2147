"""`raycomplete plan`: reads shapes of the run file's models, plans, and prints tables by role."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.organisms import ORGANISMS
from raycomplete.plan import catalogue
from raycomplete.plan.catalogue import GIB, ModelShape
from raycomplete.plan.estimate import Estimate, Request, make_plan, sync_bytes
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import CheckpointError


def plan(
    config: RunConfig,
    *,
    hardware: str = "h100",
    student: str | None = None,
    teacher: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Estimate:
    """Plans the run of a run file and prints it.

    Student and teacher are names of shapes, or folders with a config.json, in place of the run file's models; `options`
    are those of `Request`.
    """
    console = console or Console()
    shapes = shapes_of(config, student, teacher)
    estimate = make_plan(Request(config, shapes, catalogue.find_hardware(hardware), **options))
    if as_json:
        console.rich.print_json(json.dumps(estimate.to_json()))
    else:
        _show(estimate, console)
    return estimate


def shapes_of(config: RunConfig, student: str | None = None, teacher: str | None = None) -> dict[str, ModelShape]:
    """Shapes of student, aligned and base, of which names or folders may be given in place of the run file's."""
    models = config.models
    base = _shape(teacher) if teacher else _shape(models.base, "base")
    # Before `raycomplete align` has made the twin, it is known from the base that it will be made from.
    unmade = config.align.refusals and ":" not in models.aligned and not Path(models.aligned).is_dir()
    aligned = base if teacher or unmade else _shape(models.aligned, "aligned")
    if student:
        return {"student": _shape(student), "aligned": aligned, "base": base}
    trained = aligned if models.student is None else _shape(models.student, "student")
    return {"student": trained, "aligned": aligned, "base": base}


def _shape(spec: str, role: str | None = None) -> ModelShape:
    """Reads a model's config.json; weights are neither read nor downloaded.

    With a role, `spec` is a checkpoint of the run file; else a folder, a config.json or a known name.
    """
    scheme, _, rest = spec.partition(":")
    path = Path(spec).expanduser()
    if role is None and path.suffix != ".json" and not path.is_dir():
        return catalogue.preset(spec)
    if role and scheme == "hub" and rest:
        if found := catalogue.preset_of_hub(rest):
            return found
        flag = "--student" if role == "student" else "--teacher"
        words = f"models.{role}: the shape of {spec} is not known, and a plan downloads nothing."
        raise CheckpointError(words, f"Give {flag} a folder that holds its config.json, or a model of its size.")
    if role and scheme in ORGANISMS and rest:
        built = ORGANISMS[scheme].find_checkpoint(rest)
        if built is None:  # a plan trains nothing
            return catalogue.shape_from_config(ORGANISMS[scheme].config, spec)
        path = built
    elif role and not path.is_dir():  # a GGUF file or a package: converted as training would convert it
        from raycomplete.data.sources import resolve_checkpoint

        path = resolve_checkpoint(spec, role=role)
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a model's config.json.", "Check the path.") from error
    return catalogue.shape_from_config(content, spec)


def _show(estimate: Estimate, console: Console) -> None:
    """Prints tables by role, the bottleneck, and what was assumed, none of it wider than 80 columns."""
    request, step, trained = estimate.request, estimate.step_s, estimate.request.work.trained_tokens
    models = ", ".join(f"{role} {shape.name} ({_billions(shape)})" for role, shape in request.shapes.items())
    console.rich.print(f"{models}\n{request.nodes} x {request.devices_per_node} {request.hardware.label}\n")
    rows = [["role", "devices", "tokens a step", "tokens/s", "time", "busy"]]
    for role, rate in estimate.rates.items():
        devices = f"{rate['processes']} x {rate['devices'] // rate['processes']}"
        speed = [f"{rate['tokens']:,.0f}", f"{rate['tokens_per_s']:,.0f}", _seconds(rate["seconds"])]
        rows.append([role, devices, *speed, f"{rate['busy']:.0%}"])
    console.table("Placement and speed of one step", rows)
    usable, roles = request.usable_bytes / GIB, list(estimate.memory.values())
    rows = [["", *estimate.memory]]
    for part in dict.fromkeys(part for parts in roles for part in parts):
        rows.append([part, *(f"{parts[part] / GIB:.3g}" if part in parts else "" for parts in roles)])
    rows.append(["total", *(f"{sum(parts.values()) / GIB:.3g}" for parts in roles)])
    console.table(f"Memory of one device, GiB ({usable:.1f} can be filled)", rows)
    hours = f"{estimate.hours:.2f} hours" if estimate.hours >= 1 else f"{estimate.hours * 60:.1f} minutes"
    steps, moved = request.config.train.steps, sync_bytes(request)
    console.panel(
        [
            ("step", _seconds(step)),
            ("trained tokens", f"{trained:,.0f} a step, {trained / step:,.0f} a second"),
            *([("weights to engines", f"{moved / 1e9:,.3g} GB an update")] if moved else []),
            ("whole run", f"{steps} steps, {hours}, {estimate.cost:,.3g}"),
            ("cost", f"{estimate.cost / (steps * trained) * 1e6:.3g} per million trained tokens"),
        ]
    )
    wrap = textwrap.TextWrapper(console.rich.width)
    sentence = f"Bottleneck: {estimate.bottleneck}, {_seconds(step)} a step."
    console.rich.print(f"\n{wrap.fill(sentence)}\n\nAssumed:", highlight=False)
    wrap.initial_indent, wrap.subsequent_indent = "  - ", "    "
    for line in estimate.assumptions():
        console.rich.print(wrap.fill(line), highlight=False)


def _billions(shape: ModelShape) -> str:
    count = shape.num_parameters
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
