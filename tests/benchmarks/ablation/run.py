"""Runs `raycomplete train` once for each configuration, one after the other, and gathers one table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raycomplete.config import dump, load_run_file
from raycomplete.evaluation.summary import rate_text
from raycomplete.runtime.files import content_hash, read_json, write_json, write_text
from tests.benchmarks.environment import ROOT, describe, environment
from tests.benchmarks.tables import Table

# Each differs from "full" in one thing, whatever the run file itself says of it.
FULL = "full"
_FULL = {"rollout.on_policy": "false", "method.depth.schedule": "adaptive"}
_BY_MODEL = ("units", "benign_nll")  # folders of an evaluation with a file for each model
CONFIGURATIONS: dict[str, dict[str, str]] = {
    FULL: {},
    "no anchor": {"method.weights.anchor": "0"},
    "no recovery": {"method.weights.recovery": "0"},
    "no push-forward": {"method.weights.push_forward": "0"},
    "push-forward at temperature 1": {"method.push_forward.temperature": "1"},
    "push-forward where unfinished": {"method.push_forward.min_weight": "0.1"},
    "penalty": {"method.weights.penalty": "1"},
    "contrastive teacher": {"method.contrastive.alpha": "0.5"},
    "uniform depth": {"method.depth.schedule": "uniform"},
    "on-policy": {"rollout.on_policy": "true"},
}
_COLUMNS = ("", "attack success, mean", "deepest", "utility", "over-refusal", "benign NLL over aligned's", "tokens")
_TIMEOUT_S = 4 * 3600.0


def run(
    run_file: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains, evaluates, prints and writes.

    Args:
        run_file: What is changed one thing at a time.
        out: Folder of the runs, results.json and results.md.
        overrides: `key=value` for every configuration.
        only: Configurations to run; of the others, finished ones still stand in the table.
        console: Where progress and the table go.

    Returns:
        summary.json of every finished configuration.
    """
    console = console or Console(width=160)
    for name in only or CONFIGURATIONS:
        command = command_of(name, run_file, out, overrides)
        if finished(name, out, command) is not None:
            continue
        console.print(f"{name}: {' '.join(command)}", style="dim")
        borrow_answers(name, run_file, out, overrides)
        log = out / f"{folder_name(name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            console.print(f"{name}: ended with {done.returncode}, see {log}", style="red")
            continue
        write_json(out / folder_name(name) / "ablation.json", {"command": command})
    found = {
        name: summary
        for name in CONFIGURATIONS
        if (summary := finished(name, out, command_of(name, run_file, out, overrides))) is not None
    }
    stats = describe(environment(torch.device("cpu")))
    table = table_of(found, f"Ablation, {run_file.name} {' '.join(overrides)}".rstrip())
    table.show(console)
    write_text(out / "results.json", json.dumps(found, indent=2) + "\n")
    write_text(out / "results.md", f"{stats}\n\n{table.to_markdown()}")
    return found


def command_of(name: str, run_file: Path, out: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of one configuration; `--resume` also starts what was never begun."""
    settings = settings_of(name, out, overrides)
    return [sys.executable, "-m", "raycomplete", "train", str(run_file.resolve()), *settings, "--resume"]


def settings_of(name: str, out: Path, overrides: Sequence[str]) -> list[str]:
    """Every override of one configuration."""
    own = [f"{key}={value}" for key, value in (_FULL | CONFIGURATIONS[name]).items()]
    return [*overrides, *own, f"output.root={out.resolve()}", f"output.name={folder_name(name)}"]


def folder_name(name: str) -> str:
    """Names the folder of the run of a configuration."""
    return name.replace(" ", "-")


def finished(name: str, out: Path, command: Sequence[str]) -> dict[str, Any] | None:
    """summary.json of a configuration that was run to its end by this very command."""
    folder = out / folder_name(name)
    mark = read_json(folder / "ablation.json")
    if mark is None or mark["command"][1:] != list(command[1:]):  # another interpreter is no other configuration
        return None
    found: dict[str, Any] | None = read_json(folder / "summary.json")
    return found


def borrow_answers(name: str, run_file: Path, out: Path, overrides: Sequence[str]) -> None:
    """Base and aligned are the same in every run: what they answered once is found again by its content.

    Prefills go along, so that every student is attacked with the same words.
    """
    target = out / folder_name(name)
    others = [out / folder_name(other) for other in CONFIGURATIONS]
    source = next((folder / "evaluation" for folder in others if (folder / "ablation.json").is_file()), None)
    if target.exists() or source is None:
        return
    # A run resumes only from a folder with the settings of that very run.
    settings = dump(load_run_file(run_file, settings_of(name, out, overrides)))
    ids = [(read_json(source / f"{role}.json") or {})["model_id"] for role in ("base", "aligned")]
    files = [source / "prefills.json", *source.glob("judgements/*.jsonl")]
    files += [source / kind / f"{content_hash(model_id)[:16]}.jsonl" for model_id in ids for kind in _BY_MODEL]
    for file in files:
        if file.is_file():
            copy = target / "evaluation" / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
    write_text(target / "config.yaml", settings)


def table_of(summaries: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """A row for each student, and first the aligned model that all of them start from."""
    rows = []
    for name, summary in summaries.items():
        if not rows:
            rows.append(_row("aligned", summary, "aligned", "1", ""))
        nll = summary["benign_nll"].get("student_to_aligned")
        ratio = "-" if nll is None else f"{nll['ratio']:.3f} [{nll['low']:.3f}, {nll['high']:.3f}], n = {nll['n']}"
        rows.append(_row(name, summary, "student", ratio, f"{summary['train']['tokens']:,}"))
    return Table(title, _COLUMNS, rows)


def _row(name: str, summary: Mapping[str, Any], role: str, nll: str, tokens: str) -> tuple[str, ...]:
    asr = summary["asr"][role]
    deepest = max(asr["by_depth"], key=int)
    rates = (asr["mean"], asr["by_depth"][deepest], summary["utility"][role], summary["over_refusal"][role])
    return (name, *(f"{rate_text(rate)}, n = {rate['n']}" for rate in rates), nll, tokens)
