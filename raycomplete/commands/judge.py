"""`raycomplete judge calibrate`: measures how often a judge errs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from raycomplete.config import parse
from raycomplete.config.evaluation import JudgeConfig
from raycomplete.engines.cluster import ResourcePlan, connect, engine_request
from raycomplete.evaluation.calibration import calibrate, read_labelled
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.model_judges import start_judge
from raycomplete.evaluation.summary import rate_text
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_json


def calibrate_judge(
    file: Path, settings: JudgeConfig, output: Path, *, max_length: int = 2048, console: Console | None = None
) -> dict[str, Any]:
    """Measures a judge on human-labelled completions and stores its error rates.

    Args:
        file: CSV or JSONL with prompt, completion, and human_label or annotation_1, annotation_2.
        settings: The judge.
        output: JSON file that `evaluation.judge.calibration` may name.
        max_length: Longest sequence of a judge model.
        console: Where the result is printed.

    Returns:
        The error rates, as they are stored.

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
    found["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()  # of the very labels
    write_json(output, found)
    lines: list[tuple[str, Any]] = [("judge", found["judge"]), ("measured on", found["on"])]
    rates = [name for name in ("sensitivity", "specificity", "partial", "agreement") if found[name] is not None]
    lines += [(name, f"{rate_text(found[name])}, n = {found[name]['n']}") for name in rates]
    console.panel([*lines, ("kappa", found["kappa"]), ("stored in", output)])
    return found
