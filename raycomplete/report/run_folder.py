"""Reads what a run or a diagnosis left in its folder: summary.json or diagnosis.json; all else may be missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.evaluation.summary import OTHER_RATES, defence_name, reductions
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.metrics_file import finite, read_metrics
from raycomplete.runtime.types import MODEL_ROLES

COLUMNS = ("role", "measure", "attack", "variant", "value", "low", "high", "n", "defence")


@dataclass(frozen=True)
class RunFolder:
    """Results of one run."""

    summary: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    terms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    diagnosis: Mapping[str, Any] | None = None
    config: str | None = None

    @property
    def reduced(self) -> str:
        """Why the rates are less than those of published runs; empty where they are not."""
        return "; ".join(f"{name}: {reasons}" for name, reasons in reductions(self.summary))


def read_run_folder(folder: Path) -> RunFolder:
    """Reads a run folder."""
    # A run and the diagnosis of the same name share one page.
    beside = folder.with_name(f"{folder.name}-diagnosis")
    diagnosis = _read_mapping(folder / "diagnosis.json") or _read_mapping(beside / "diagnosis.json")
    summary = _read_mapping(folder / "summary.json")
    if summary is None and diagnosis is not None:
        summary = {"name": diagnosis["name"], "versions": diagnosis.get("versions")}
    if summary is None:
        raise DataError(
            f"The run folder {folder} has no summary.json.",
            "Finish the run first: raycomplete evaluate writes it, and raycomplete diagnose a diagnosis.json.",
        )
    results = {role: _read_mapping(folder / "evaluation" / f"{role}.json") for role in MODEL_ROLES}
    found: dict[str, dict[str, Any]] = {
        role: result for role, result in results.items() if result is not None and _is_of(summary, role, result)
    }
    for key in ("asr", "utility", "over_refusal", "benign_refusal"):
        if not summary.get(key):
            summary = {**summary, key: {role: result[key] for role, result in found.items() if key in result}}
    attacks = {name: dict(by_role) for name, by_role in (summary.get("attacks") or {}).items()}
    for role, result in found.items():
        for name, block in result.get("attacks", {}).items():
            attacks.setdefault(name, {}).setdefault(role, block)
    summary = {**summary, "attacks": attacks}
    config, training = folder / "config.yaml", _read_mapping(folder / "training.json") or summary.get("train") or {}
    return RunFolder(
        summary=summary,
        results=found,
        metrics=tuple(map(finite, read_metrics(folder / "metrics.jsonl"))),
        terms=training.get("terms") or {},
        profile=_read_mapping(folder / "profile.json"),
        diagnosis=diagnosis,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def _is_of(summary: Mapping[str, Any], role: str, result: Mapping[str, Any]) -> bool:
    """Tells whether a result is of the summary's evaluation, and not of one before it or one that was cut off since."""
    settings = {name: value for name, value in result.get("settings", {}).items() if name != "temperature"}
    pairs = (summary.get("judge"), result.get("judge")), (summary.get("evaluation"), settings or None)
    return role in (summary.get("asr") or {role}) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _read_mapping(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).", "Remove it or run that stage again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a mapping.", "Remove it or run that stage again.")
    return content


def rate_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Lists every number of a run's evaluation that has an interval."""
    defence = defence_name(run.summary) or ""
    return [
        dict(zip(COLUMNS, (*key, *numbers, defence if key[0] == "student" else ""), strict=True))
        for key, numbers in _rows(run.summary)
    ]


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str, str], tuple[Any, ...]]]:
    for role, asr in (summary.get("asr") or {}).items():
        for depth, rate in asr["by_depth"].items():
            yield (role, "asr", "prefill", f"prefill-{depth}"), _numbers(rate)
        yield (role, "asr", "prefill", ""), _numbers(asr["mean"])
    for name, by_role in summary["attacks"].items():
        for role, block in by_role.items():
            if name != "prefill":
                yield (role, "asr", name, ""), _numbers(block["mean"])
                for variant, found in block.get("variants", {}).items():
                    yield (role, "asr", name, variant), _numbers(found["asr"])
            yield (role, "asr_worst_of_n", name, ""), _numbers(block["worst_of_n"])
    for name in OTHER_RATES:
        for role, rate in (summary.get(name) or {}).items():
            yield (role, name, "", ""), _numbers(rate)
    for source, by_role in (summary.get("over_refusal_by_source") or {}).items():
        for role, rate in by_role.items():
            yield (role, "over_refusal", "", source), _numbers(rate)
    for role, nll in (summary.get("benign_nll") or {}).items():
        if "nats_per_token" in nll:  # the mapping holds a comparison of the roles too
            yield (role, "benign_nll", "", ""), _numbers(nll, "nats_per_token")
    for name, by_role in (summary.get("capabilities") or {}).items():
        for role, found in by_role.items():
            yield (role, "accuracy", name, ""), _numbers(found["accuracy"])


def _numbers(rate: Mapping[str, Any], key: str = "rate") -> tuple[Any, ...]:
    if not rate["n"]:  # without a prompt, 0 would be no measurement
        return None, None, None, 0
    return rate[key], rate["low"], rate["high"], rate["n"]
