"""`raycomplete judge calibrate`: measures how often a judge errs."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from raycomplete.config import parse
from raycomplete.config.evaluation import JudgeConfig
from raycomplete.engines.cluster import ResourcePlan, connect, engine_request
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.evaluation.calibration import calibrate, read_labelled
from raycomplete.evaluation.judges import RefusalJudge, measured, trap_errors
from raycomplete.evaluation.model_judges import ZOO_JUDGE, read_rubric, start_judge
from raycomplete.evaluation.summary import rate_text, trap_lines
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json


def calibrate_judge(
    file: Path, settings: JudgeConfig, output: Path, *, max_length: int = 1024, console: Console | None = None
) -> dict[str, Any]:
    """Measures a judge on human-labelled completions and stores its error rates in `output`, which it returns.

    `max_length` is `models.max_length` of the run whose rates are corrected: it is part of a judge model's name.
    """
    by_rubric = settings.kind in ("model", "endpoint")
    if settings.kind == "judgezoo" or (by_rubric and read_rubric(settings.rubric).judges == "harm"):
        name = (settings.model or ZOO_JUDGE) if settings.kind == "judgezoo" else settings.rubric
        raise ConfigError(
            f"The judge {name} rates harm and knows no refusals, so human labels of refusals measure nothing of it.",
            "Calibrate a judge of kind patterns, or a model by a rubric of refusals.",
        )
    console = console or Console()
    rows = read_labelled(file)
    on = f"{len(rows)} human-labelled completions of {file.name}"
    checkpoint = settings.checkpoint or "organism:base"  # of which nothing is read but by a judge model
    tree = {
        "models": {"base": checkpoint, "aligned": checkpoint, "max_length": max_length},
        "data": {},
        "evaluation": {"judge": settings.model_dump(mode="json") | {"calibration": None}},
    }
    config = parse(tree, "judge calibrate")
    with ExitStack() as ended:
        if settings.kind == "model":
            plan = ResourcePlan((engine_request(config.cluster, "judge", 1),))
            ended.enter_context(connect(config.cluster, plan, console))
            config = resolve_dtype(config, console)
        judge = ended.enter_context(start_judge(config, RefusalJudge(), console))
        found = calibrate(judge, rows, on) | {"traps": trap_errors(judge)}
        found |= {name: value for name, value in (measured(judge) or {}).items() if name == "on_topic"}
    found["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()  # of the very labels
    write_json(output, found)
    lines: list[tuple[str, Any]] = [("judge", found["judge"]), ("measured on", found["on"])]
    rates = [name for name in ("sensitivity", "specificity", "partial", "agreement") if found[name] is not None]
    lines += [(name, f"{rate_text(found[name])}, n = {found[name]['n']}") for name in rates]
    lines += [("kappa", found["kappa"]), *trap_lines(found), ("stored in", output)]
    console.panel(lines)
    return found
