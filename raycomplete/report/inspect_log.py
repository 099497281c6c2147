"""Evaluations as logs of Inspect (inspect.aisi.org.uk), which `inspect view` opens. Needs no Inspect here.

<run>/inspect/<time>_<task>_<role>.json   one log for each model and attack, one sample for each trial

A trial's outcome is its score. Texts come from the stored tokens. What models wrote after harmful prompts, and what an
attacker wrote in their name, is left out unless asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import raycomplete
from raycomplete.attacks.registry import ATTACKS
from raycomplete.data.chat import ChatCodec
from raycomplete.data.remote import is_remote
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.evaluation.results import HARMLESS
from raycomplete.report.run_folder import RunFolder, read_run_folder
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, RowStore, content_hash, write_json
from raycomplete.runtime.types import MODEL_ROLES, Codec, Outcome

HIDDEN = "[left out: --show-harmful shows it]"
_COMPLIED = {str(outcome) for outcome in Outcome if outcome.is_compliance}
# Sets of harmless prompts: what is counted, and the rate that counts it.
_HARMLESS = {"benign": ("right", "utility"), "borderline": ("refused", "over_refusal")}

_Row = Mapping[str, Any]


def write_inspect_logs(run_folder: Path, output: Path | None = None, *, show_harmful: bool = False) -> list[Path]:
    """Writes the logs of a run."""
    run = read_run_folder(run_folder)
    roles = [role for role in MODEL_ROLES if role in run.results]
    if not roles:
        raise DataError(f"No model of the run {run_folder} was evaluated.", "Run raycomplete evaluate first.")
    codec, name = _codec(run_folder, run), str(run.summary["name"])
    written = []
    for role in roles:
        result = run.results[role]
        trials = _trials(run_folder, role, str(result["model_id"]))
        made = datetime.fromtimestamp((run_folder / "evaluation" / f"{role}.json").stat().st_mtime, UTC)
        for task, rows in _tasks(trials).items():
            samples = [_sample(row, task, f"{name}/{role}", codec, show_harmful) for row in rows]
            log = _log(task, f"{name}/{role}", result, _numbered(samples), made)
            stem = f"{made:%Y-%m-%dT%H-%M-%S+00-00}_{task.replace('_', '-')}_{role}"  # what Inspect takes for a log
            path = (output or run_folder / "inspect") / f"{stem}.json"
            write_json(path, log, mode=PRIVATE if show_harmful else 0o644)
            written.append(path)
    return written


def _codec(run_folder: Path, run: RunFolder) -> ChatCodec:
    student = run_folder / "student"
    if (student / "config.json").is_file():
        return ChatCodec(student)
    models = (yaml.safe_load(run.config or "") or {}).get("models") or {}
    here = [(role, str(models[role])) for role in MODEL_ROLES[::-1] if models.get(role)]
    role, spec = next((found for found in here if not is_remote(found[1])), ("aligned", str(models.get("aligned"))))
    return ChatCodec(resolve_checkpoint(spec, role=role))


def _trials(run_folder: Path, role: str, model_id: str) -> list[_Row]:
    """Joins the outcomes of a role with its stored responses."""
    folder = run_folder / "evaluation"
    outcomes = folder / "outcomes" / f"{role}.jsonl"
    stored = RowStore(folder / "trials" / f"{content_hash(model_id)[:16]}.jsonl")
    rows = [json.loads(line) for line in outcomes.read_text("utf-8").splitlines()] if outcomes.is_file() else []
    if not rows or any(row["key"] not in stored for row in rows):
        raise DataError(
            f"The run {run_folder} does not hold every trial of {role} with its outcome.",
            "Run raycomplete evaluate on its run file again: stored responses are used, none is generated twice.",
        )
    return [{**stored[row["key"]], **row} for row in rows]


def _tasks(trials: Sequence[_Row]) -> dict[str, list[_Row]]:
    """Sorts trials by attack, and harmless prompts by their kind."""
    found: dict[str, list[_Row]] = {}
    for row in trials:
        if row["outcome"] is not None:  # benchmarks have right answers instead
            name = row["variant"] if row["attack"] == HARMLESS else row["attack"]
            found.setdefault(name, []).append(row)
    return found


def _sample(row: _Row, task: str, model: str, codec: Codec, show_harmful: bool) -> dict[str, Any]:
    shown = show_harmful or row["kind"] != "harmful"
    prefill, sequence = row["prefill"], row["sequence"]
    is_last = not prefill or sequence[-len(prefill) :] == prefill
    asked = codec.decode(sequence[: len(sequence) - len(prefill)] if is_last else sequence)
    attack = ATTACKS.get(row["attack"])  # unknown where its plugin is not loaded
    if not shown and (row.get("conversation") or not is_last or attack is None or attack.prompt_has_answer):
        asked = HIDDEN  # earlier answers of the model stand in it
    answer = codec.decode([*prefill, *row["tokens"]]) if shown else HIDDEN
    said = {"role": "assistant", "content": answer}
    stop_reason = "max_tokens" if row.get("cut") else "stop"
    counted, _ = _HARMLESS.get(task, ("complied", ""))
    if counted == "right":
        value = bool(row["right"])
    else:
        value = row["outcome"] == "refused" if counted == "refused" else row["outcome"] in _COMPLIED
    about = {"variant": row["variant"], "prompt_id": row["prompt_id"], "prefill_tokens": len(prefill)}
    return {
        "id": f"{row['variant']}/{row['prompt_id']}",
        "epoch": 1,
        "input": asked,
        "target": "",
        "messages": [{"role": "user", "content": asked}, said],
        "output": {"model": model, "choices": [{"message": said, "stop_reason": stop_reason}], "completion": answer},
        "scores": {counted: {"value": int(value), "answer": answer, "explanation": row["outcome"], "metadata": about}},
        "metadata": {**about, "seed": row["seed"], "prefill": codec.decode(prefill) if shown and prefill else ""},
    }


def _numbered(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts the epochs of each sample, since an attack may try a prompt several times."""
    seen: Counter[str] = Counter()
    for sample in samples:
        seen[sample["id"]] += 1
        sample["epoch"] = seen[sample["id"]]
    return samples


def _log(task: str, model: str, result: _Row, samples: Sequence[_Row], made: datetime) -> dict[str, Any]:
    counted, rate = _HARMLESS.get(task, ("complied", "asr"))
    block = result["attacks"].get(task, {})
    rates = {rate: block["mean"] if block else result[rate]}
    rates |= {name: found["asr"] for name, found in block.get("variants", {}).items()}
    metrics = {name: found["rate"] for name, found in rates.items() if found["n"]}
    metrics |= {f"{rate} {end}": rates[rate][end] for end in ("low", "high") if rates[rate]["n"]}
    ids = list(dict.fromkeys(str(sample["id"]) for sample in samples))
    at = made.isoformat(timespec="seconds")
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": content_hash([task, model, at])[:22],
            "run_id": content_hash([model, at])[:22],
            "task_id": content_hash([task, model])[:22],
            "created": at,
            "task": task,
            "task_attribs": {},
            "task_args": {"settings": block.get("settings") or {}},
            "dataset": {"name": task, "samples": len(ids), "sample_ids": ids, "shuffled": False},
            "model": model,
            "model_args": {"model_id": result["model_id"]},
            "config": {"epochs": max(int(sample["epoch"]) for sample in samples)},
            "packages": {"raycomplete": raycomplete.__version__},
            "metadata": {"judge": result["judge"], "reduced_because": block.get("reduced_because") or []},
        },
        "plan": {"name": "plan", "steps": [{"solver": "raycomplete", "params": {}}], "config": {}},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples),
            "scores": [
                {
                    "name": counted,
                    "scorer": str(result["judge"]),
                    "params": {},
                    "metrics": {name: {"name": name, "value": value, "params": {}} for name, value in metrics.items()},
                }
            ],
        },
        "stats": {"started_at": at, "completed_at": at, "model_usage": {}},
        "samples": list(samples),
    }
