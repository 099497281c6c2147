"""Diagnosis: where alignment stopped, by position. Needs a base and an aligned checkpoint, and trains nothing.

    refusal_tokens.json  ->  batches/  ->  gradient.json  ->  diagnosis.json, report.html

Everything lies in `<root>/<name>-diagnosis/`, beside the run of that name, whose student is shown where there is one.
A part whose result is there is not made again, so `--resume` continues an interrupted diagnosis where it stopped.
"""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path
from typing import Any

from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig
from raycomplete.data.inputs import Prompts, prepare_models
from raycomplete.data.remote import refuse_remote
from raycomplete.diagnosis.gradient import measure_gradient
from raycomplete.diagnosis.measurement import (
    BATCH_PROMPTS,
    Measurement,
    measure_kind,
    start_diagnosis_engines,
    with_refusal_tokens,
)
from raycomplete.diagnosis.samples import KINDS, read_prompts
from raycomplete.diagnosis.statistics import summarize
from raycomplete.engines.cluster import plan_run
from raycomplete.engines.run import OutputFolder, Run, open_run
from raycomplete.report.html import write_report
from raycomplete.report.plots import depth_words
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.section import without_none
from raycomplete.runtime.types import MODEL_ROLES, ModelRole

_SAME = ("models", "data", "rollout")  # sections that decide what is measured
_FREE_KEYS = {"gradient", "show_harmful"}  # they concern what is made from the batches, and may change on --resume


@stored("-diagnosis")
def diagnose(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Measures where alignment stopped."""
    console = console or Console()
    started = time.perf_counter()
    config.models.refuse_thinking()
    refuse_remote(config.models)  # models.student too, in whose place the student of the run comes
    config = _of_diagnosis(config)
    roles: tuple[ModelRole, ...] = ("base", "aligned") if config.models.student is None else MODEL_ROLES
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(config, roles)
        prompts = {kind: list(read_prompts(config, kind)) for kind in KINDS}
    first = {kind: found[:BATCH_PROMPTS] for kind, found in prompts.items()}
    folder = OutputFolder(config, same=_SAME, resume=resume, overwrite=overwrite)
    with open_run(folder, models, Prompts({}, {}), plan_run(config, scorers=roles), console) as run:
        check_same_inputs(run)
        console.note(f"Folder of the diagnosis: {run.folder}")
        with start_diagnosis_engines(run, list(chain(*zip(*first.values(), strict=False)))):
            measurement = with_refusal_tokens(run, Measurement.of_run(run), first["harmful"])
            measured = {str(kind): measure_kind(run, measurement, kind, prompts[kind]) for kind in KINDS}
            found = summarize(run, measured, measurement.policies)
            _publish(run, found, started)
            console.note(f"First pictures: {run.folder / 'report.html'}")
            found["gradient"] = measure_gradient(run, measurement, measured["harmful"][0], first["harmful"])
        _publish(run, found, started)
        _print_result(run, found)
    return run.folder


def _of_diagnosis(config: RunConfig) -> RunConfig:
    """The same run file with its own folder, and with the student that is to be diagnosed."""
    trained = config.output.folder / "student"
    student = config.diagnose.student or (str(trained) if (trained / "config.json").is_file() else None)
    output = config.output.renamed("-diagnosis")
    models = config.models.model_copy(update={"student": student})
    return config.model_copy(update={"output": output, "models": models})


def check_same_inputs(run: Run) -> None:
    """Refuses to resume with other checkpoints and settings than the diagnosis started with."""
    settings = run.config.diagnose.model_dump(mode="json", exclude=_FREE_KEYS)
    inputs = {f"models.{role}": run.models.fingerprint(role) for role in run.models.paths}
    inputs |= {f"diagnose.{key}": value for key, value in settings.items()}
    inputs = without_none(inputs)
    known = without_none(read_json(run.folder / "inputs.json"))
    if known is None:
        write_json(run.folder / "inputs.json", inputs)
    elif known != inputs:
        changed = ", ".join(sorted(name for name in known | inputs if known.get(name) != inputs.get(name)))
        raise ConfigError(
            f"Since the diagnosis in {run.folder} was started, these changed: {changed}.",
            "Run again with --overwrite, or choose another output.name.",
        )


def _publish(run: Run, found: dict[str, Any], started: float) -> None:
    found["seconds"] = time.perf_counter() - started
    write_json(run.folder / "diagnosis.json", found)
    write_report(run.folder)


def _print_result(run: Run, found: dict[str, Any]) -> None:
    """The closing lines: one number a model, and where the pictures are."""
    lines: list[tuple[str, Any]] = []
    for kind, summary in found["kinds"].items():
        lines.append((f"{kind} prompts", f"{summary['measured']} measured of {summary['prompts']}"))
        depths = summary["completion_depth"].items()
        lines += [(f"completion depth of {role}, {kind}", depth_words(depth)) for role, depth in depths]
    lines += [("time", f"{found['seconds']:.0f} s"), ("report", run.folder / "report.html")]
    run.console.panel(lines)
