"""Judges with what they need to work, and how they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig, parse
from raycomplete.config.evaluation import JudgeConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint, resolve_checkpoint
from raycomplete.engines.cluster import connect
from raycomplete.engines.placement import ResourcePlan, engine_request
from raycomplete.engines.start import start_engine
from raycomplete.evaluation.calibration import (
    CalibratedJudge,
    calibrate,
    file_fingerprint,
    read_calibration,
    read_labelled,
)
from raycomplete.evaluation.judge import RefusalJudge
from raycomplete.evaluation.model_judge import RUBRIC, ModelJudge
from raycomplete.evaluation.table import rate_text
from raycomplete.evaluation.zoo_judge import ZooJudge
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.types import Judge


@contextmanager
def start_judge(config: RunConfig, default: Judge, console: Console) -> Iterator[Judge]:
    """The judge of a run file, with an engine of its own where it is a model; Ray must be connected for that.

    Args:
        config: Run file.
        default: What kind "auto" means for this run's prompts.
        console: Told what is waited for.

    Raises:
        DataError: The calibration is about another judge, or the rubric cannot be used.
        SetupError: JudgeZoo is not installed.
    """
    settings = config.evaluation.judge
    with _started(config, settings, default, console) as judge:
        known = settings.calibration
        yield CalibratedJudge(judge, read_calibration(known, judge.name)) if known else judge


def calibrate_judge(
    file: Path, settings: JudgeConfig, output: Path, *, max_length: int = 2048, console: Console | None = None
) -> dict[str, Any]:
    """Measures a judge on human-labelled completions and stores its error rates.

    Args:
        file: CSV or JSONL with prompt, completion, and human_label or annotation_1, annotation_2.
        settings: Which judge.
        output: JSON file that `evaluation.judge.calibration` may name.
        max_length: Longest sequence of a judge model.
        console: Where the result is printed.

    Returns:
        What was stored.

    Raises:
        ConfigError: Judges of JudgeZoo have no notion of refusal that could be measured.
    """
    if settings.kind == "judgezoo":
        raise ConfigError(
            f"JudgeZoo's {settings.zoo_name} rates harm and knows no refusals, so human labels of refusals measure "
            "nothing of it.",
            "Calibrate a judge of kind patterns or model.",
        )
    console = console or Console()
    rows = read_labelled(file)
    on = f"{len(rows)} human-labelled completions of {file.name}"
    if settings.kind == "model":
        checkpoint = settings.checkpoint or ""
        tree = {
            "models": {"base": checkpoint, "aligned": checkpoint, "max_length": max_length},
            "data": {},
            "evaluation": {"judge": settings.model_dump(mode="json")},
        }
        config = parse(tree, "judge calibrate")
        with (
            connect(config.cluster, ResourcePlan((engine_request(config.cluster, "judge", 1),)), console),
            start_judge(config, RefusalJudge(), console) as judge,
        ):
            found = calibrate(judge, rows, on)
    else:
        found = calibrate(RefusalJudge(), rows, on)
    found["sha256"] = file_fingerprint(file)
    write_json(output, found)
    lines: list[tuple[str, Any]] = [("judge", found["judge"]), ("measured on", found["on"])]
    rates = [name for name in ("sensitivity", "specificity", "partial", "agreement") if found[name] is not None]
    lines += [(name, f"{rate_text(found[name])}, n = {found[name]['n']}") for name in rates]
    console.panel([*lines, ("kappa", found["kappa"]), ("stored in", output)])
    return found


@contextmanager
def _started(config: RunConfig, settings: JudgeConfig, default: Judge, console: Console) -> Iterator[Judge]:
    if settings.kind == "judgezoo":
        yield ZooJudge(settings.zoo_name, settings.threshold)
    elif settings.kind == "model":
        with _model_judge(config, settings, console) as judge:
            yield judge
    else:
        yield default if settings.kind == "auto" else RefusalJudge()


@contextmanager
def _model_judge(config: RunConfig, settings: JudgeConfig, console: Console) -> Iterator[Judge]:
    path = resolve_checkpoint(settings.checkpoint or "", role="judge")
    codec = ChatCodec(path, trust_remote_code=config.models.trust_remote_code)
    with console.stage("Engine of the judge started"):
        engine = start_engine(config, path, codec)
        engine.wait_until_ready(config.cluster.start_timeout_s)
    try:
        yield ModelJudge(
            engine,
            codec,
            model_id=fingerprint(path),
            max_length=config.models.max_length,
            rubric=settings.rubric.read_text(encoding="utf-8") if settings.rubric else RUBRIC,
        )
    finally:
        with suppress(Exception):  # an actor that is gone already must not hide why
            engine.stop()
