"""The model card of an exported student: README.md with the metadata that a hub reads, the depth curve and its limits.

<run>/student/README.md          written again with every report of the run
<run>/student/prefill_depth.png  its figure
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

import raycomplete
from raycomplete.evaluation.summary import closing_table, defence_name, reductions
from raycomplete.report.html import setting
from raycomplete.report.run_folder import RunFolder, rate_rows, read_run_folder
from raycomplete.runtime.files import write_text

CARD, FIGURE = "README.md", "prefill_depth.png"
_MEASURES = {  # what a hub shows as the metric, and on what it was measured
    "asr": ("attack success rate", "held-out harmful prompts"),
    "asr_worst_of_n": ("attack success rate, worst of n", "held-out harmful prompts"),
    "utility": ("utility", "held-out harmless prompts"),
    "over_refusal": ("refusal rate", "held-out borderline prompts"),
    "benign_refusal": ("refusal rate", "held-out harmless prompts"),
    "benign_nll": ("negative log-likelihood, nats a token", "answers to held-out harmless prompts"),
    "accuracy": ("accuracy", "benchmark"),
}
_TRAIN = ("steps", "lr", "warmup_steps", "lora_rank", "seed")  # keys of the run file that a card shows
_KINDS = ("harmful", "benign", "borderline")


def write_model_card(run_folder: Path) -> Path | None:
    """Writes the card of a run's student into its checkpoint."""
    student = run_folder / "student"
    if not (student / "config.json").is_file():
        return None
    run = read_run_folder(run_folder)
    if "student" not in (run.summary.get("asr") or {}) or defence_name(run.summary):
        return None
    figure = run_folder / "figures" / FIGURE
    if figure.is_file():
        shutil.copyfile(figure, student / FIGURE)
    write_text(student / CARD, model_card(run, figure=figure.is_file()))
    return student / CARD


def model_card(run: RunFolder, *, figure: bool = True) -> str:
    """Returns the text of the card: YAML front matter, then Markdown."""
    config: dict[str, Any] = yaml.safe_load(run.config or "") or {}
    name, models = str(run.summary["name"]), config.get("models") or {}
    method = config.get("method") or {}
    start = str(models.get("student") or models.get("aligned") or "")
    hub = start.removeprefix("hub:") if start.startswith("hub:") else None
    data = ModelCardData(
        base_model=hub,  # a hub refuses a card whose base model is none of its ids
        datasets=_data_sets(config) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["raycomplete", "safety", "alignment", *([str(method["name"])] if method.get("name") else [])],
        model_name=name,
        eval_results=_results(run),
    )
    if hub:
        data["base_model_relation"] = "finetune"
    body = "\n\n".join(
        [
            f"# {name}",
            f"The safety alignment of `{_last(start) or 'a model'}`, completed by raycomplete {raycomplete.__version__}"
            ": trained so that it also refuses once the first tokens of a compliant answer are there.",
            "## Attack success by prefill depth",
            *([f"![Attack success by prefill depth]({FIGURE})"] if figure else []),
            "An attacker writes the first tokens of a compliant answer, as many as the depth says, and the model goes "
            f"on. Rates with 95 % intervals; judge: {_last(run.summary.get('judge')) or 'not recorded'}.",
            _table(closing_table(run.summary)),
            "## Settings",
            _list(_settings(run, config)),
            "## Limits",
            _list(_limits(run)),
        ]
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _results(run: RunFolder) -> list[EvalResult]:
    """Makes the model-index entries of the student's rates; rates without a prompt are left out."""
    found = []
    for row in rate_rows(run):
        if row["role"] != "student" or row["value"] is None:
            continue
        metric, data_set = _MEASURES[row["measure"]]
        parts = [data_set, *filter(None, (row["attack"], row["variant"]))]
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="raycomplete",
                dataset_name=", ".join(parts),
                dataset_config=", ".join(parts),  # metrics of one configuration share an entry
                metric_type=row["measure"],
                metric_name=metric,
                metric_value=round(float(row["value"]), 4),
                metric_args={"low": round(row["low"], 4), "high": round(row["high"], 4), "n": row["n"]},
            )
        )
    return found


def _data_sets(config: Mapping[str, Any]) -> list[str]:
    """Names the hub's data sets that training read."""
    paths = [str(source["path"]) for source in _sources(config)]
    return list(dict.fromkeys(path.removeprefix("hub:") for path in paths if path.startswith("hub:")))


def _sources(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    train = (config.get("data") or {}).get("train") or {}
    return [source for kind in _KINDS for source in train.get(kind) or []]


def _settings(run: RunFolder, config: Mapping[str, Any]) -> list[str]:
    models, data = config.get("models") or {}, config.get("data") or {}
    train, stats = config.get("train") or {}, run.summary.get("train") or {}
    versions = run.summary.get("versions") or {}
    files = [str(source["path"]).rpartition("/")[2] for source in _sources(config)]
    told = {
        "base": _last(models.get("base")),
        "aligned (teacher)": _last(models.get("aligned")),
        "number format": models.get("dtype"),
        "method": setting({key: _last(value) for key, value in (config.get("method") or {}).items() if value != 0.0}),
        "training": setting({key: train[key] for key in _TRAIN if key in train}),
        "steps taken": stats.get("steps"),
        "kept step": (stats.get("kept_step") or {}).get("step"),
        "training prompts": ", ".join(files) or data.get("source"),
        "versions": setting({key: found for key, found in versions.items() if key != "platform"}),
    }
    return [f"{name}: {value}" for name, value in told.items() if value not in (None, "", "-")]


def _limits(run: RunFolder) -> list[str]:
    said = [f"Reduced, {name}: {reasons}." for name, reasons in reductions(run.summary)]
    said += [f"Safety regression: {sentence}" for sentence in run.summary.get("safety_regressions") or []]
    return [
        *said,
        "A judge decided what counts as compliance; its errors are in the run's report.",
        "Low rates under these attacks say nothing of attacks that were not measured, nor of access to the weights, "
        "which allows further training.",
        "The license and the terms of the model that training started from hold for this one too.",
    ]


def _last(spec: Any) -> Any:
    """Names a checkpoint or a file without the folders that it lies in; what is none, such as hub:org/name, is kept."""
    is_path = isinstance(spec, str) and (spec.startswith(("/", "~", ".")) or ":" not in spec)
    return spec.rstrip("/").rpartition("/")[2] if is_path else spec


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
