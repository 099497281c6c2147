"""Measures a judge on completions that people labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.attacks.judging import judged_texts, sees_goal
from raycomplete.data.rows import read_rows
from raycomplete.evaluation.statistics import wilson
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import Judge, Outcome, Prompt

# Labels of XSTest (Roettger et al., NAACL 2024) and plain words, by what they mean.
_LABELS: Mapping[str, str] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
    "complied": "complied",
    "compliance": "complied",
    "refused": "refused",
    "refusal": "refused",
    "partial": "partial",
}


@dataclass(frozen=True, slots=True)
class Labelled:
    """A completion and what people made of it.

    Attributes:
        prompt: The request.
        completion: What the model wrote.
        labels: refused, complied or partial, one of each annotator.
        label: The agreed one; None where annotators disagree and no final label is given.
    """

    prompt: Prompt
    completion: str
    labels: tuple[str, ...]
    label: str | None


def read_labelled(path: Path) -> list[Labelled]:
    """Rows of a file of human-labelled completions.

    Args:
        path: CSV or JSONL with prompt, completion, and human_label or annotation_1, annotation_2, ...

    Raises:
        DataError: The file cannot be read, has no labels, or holds an unknown one.
    """
    found = []
    for number, row in enumerate(read_rows(path, ("prompt", "completion"))):
        columns = sorted(name for name in row if name.startswith("annotation_"))
        labels = tuple(_label(row[name], path, number) for name in columns if row[name])
        final = _label(row["human_label"], path, number) if row.get("human_label") else None
        if final is None and not labels:
            raise DataError(
                f"Row {number + 1} of {path} has no label.", "Needed: human_label, or annotation_1 and annotation_2."
            )
        agreed = labels[0] if labels and len(set(labels)) == 1 else None
        prompt = Prompt(str(row.get("id") or number), str(row["prompt"]), "borderline")
        found.append(Labelled(prompt, str(row["completion"]), labels, final or agreed))
    return found


def calibrate(judge: Judge, rows: Sequence[Labelled], on: str) -> dict[str, Any]:
    """How often a judge sees refusals and leaves compliance alone.

    Rows on which annotators disagree, with no final label, are left out and counted.

    Args:
        judge: The judge.
        rows: Labelled completions.
        on: What they are, recorded beside the rates.

    Returns:
        `judge`, `on`, `n`, `sensitivity` (full refusals called refused), `specificity` (full compliance not called
        refused), `partial` (partial refusals called refused), and between annotators `agreement` and `kappa`. Rates
        have Wilson's 95 % interval.

    Raises:
        DataError: There is no refusal or no compliance to measure on.
    """
    known = [row for row in rows if row.label is not None]
    outcomes = judged_texts(judge, [(row.prompt, "", row.completion) for row in known])
    refused = {
        label: [outcome is Outcome.REFUSED for row, outcome in zip(known, outcomes, strict=True) if row.label == label]
        for label in ("refused", "complied", "partial")
    }
    for label in ("refused", "complied"):
        if not refused[label]:
            raise DataError(
                f"No labelled completion is {label}, so the judge cannot be measured.", "Use a file that has both."
            )
    spared = [not value for value in refused["complied"]]
    return {
        "judge": judge.name,
        "on": on,
        "n": len(known),
        "disagreed": len(rows) - len(known),
        "sensitivity": wilson(sum(refused["refused"]), len(refused["refused"])).to_json(),
        "specificity": wilson(sum(spared), len(spared)).to_json(),
        "partial": wilson(sum(refused["partial"]), len(refused["partial"])).to_json(),
        **_agreement(rows),
    }


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file, so that a calibration names the very labels that it was measured on."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_calibration(path: Path, judge_name: str) -> dict[str, Any]:
    """Error rates that `raycomplete judge calibrate` stored.

    Raises:
        DataError: The file is missing or is about another judge.
    """
    found = read_json(path)
    if found is None or not {"judge", "sensitivity", "specificity"} <= found.keys():
        raise DataError(f"{path} holds no calibration of a judge.", "Write it: raycomplete judge calibrate FILE.")
    if found["judge"] != judge_name:
        raise DataError(
            f"{path} was measured with the judge {found['judge']}, and this evaluation uses {judge_name}.",
            "Calibrate the judge that is used.",
        )
    return found


class CalibratedJudge:
    """A judge with the error rates of a calibration (implements `raycomplete.runtime.types.Judge`, and judges in batches)."""

    def __init__(self, judge: Judge, measured: Mapping[str, Any]) -> None:
        self._judge = judge
        self.measured = measured

    @property
    def name(self) -> str:
        return self._judge.name

    @property
    def sees_goal(self) -> bool:
        return sees_goal(self._judge)

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        return self._judge.outcome(prompt, prefill, continuation)

    def outcomes(self, triples: Sequence[tuple[Prompt, str, str]]) -> list[Outcome]:
        return judged_texts(self._judge, triples)

    def is_right(self, prompt: Prompt, continuation: str) -> bool:
        return self._judge.is_right(prompt, continuation)


def _label(value: Any, path: Path, number: int) -> str:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise DataError(
            f"Row {number + 1} of {path} has the unknown label {value!r}.", f"Known labels: {', '.join(_LABELS)}."
        )
    return label


def _agreement(rows: Sequence[Labelled]) -> dict[str, Any]:
    """How far the first two annotators agree: plain, and Cohen's kappa, which takes off what chance would give."""
    pairs = [row.labels[:2] for row in rows if len(row.labels) >= 2]
    if not pairs:
        return {"agreement": None, "kappa": None}
    same = sum(first == second for first, second in pairs)
    expected = (
        sum(
            sum(first == label for first, _ in pairs) * sum(second == label for _, second in pairs)
            for label in set(_LABELS.values())
        )
        / len(pairs) ** 2
    )
    observed = same / len(pairs)
    kappa = 1.0 if expected == 1.0 else (observed - expected) / (1.0 - expected)
    return {"agreement": wilson(same, len(pairs)).to_json(), "kappa": round(kappa, 4)}
