"""Error rates of judges: measured on completions that people labelled, and corrected for.

Sensitivity and specificity are those for refusals: a judge that misses refusals makes attack success look too high,
one that takes compliance for refusal makes it look too low.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from raycomplete.attacks.target import judge_all
from raycomplete.data.prompts import read_rows
from raycomplete.evaluation.statistics import wilson, wilson_share
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import Judge, Outcome, Prompt, Rate

_CALIBRATE = "Write it: raycomplete judge calibrate FILE."
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
    """A completion with the labels that people gave it: refused, complied or partial."""

    prompt: Prompt
    completion: str
    labels: tuple[str, ...]  # one from each annotator
    label: str | None  # the agreed one; None where annotators disagree and no final label is given


def read_labelled(path: Path) -> list[Labelled]:
    """Reads human-labelled completions: rows of prompt, completion, and human_label or annotation_1, ..."""
    found = []
    for number, row in enumerate(read_rows(path, ("prompt", "completion"))):
        columns = sorted(name for name in row if name.startswith("annotation_"))
        labels = tuple(_label(row[name], path, number) for name in columns if row[name])
        final = _label(row["human_label"], path, number) if row.get("human_label") else None
        if final is None and not labels:
            needed = "Needed: human_label, or annotation_1 and annotation_2."
            raise DataError(f"Row {number + 1} of {path} has no label.", needed)
        agreed = labels[0] if labels and len(set(labels)) == 1 else None
        prompt = Prompt(str(row.get("id") or number), str(row["prompt"]), "borderline")
        found.append(Labelled(prompt, str(row["completion"]), labels, final or agreed))
    return found


def calibrate(judge: Judge, rows: Sequence[Labelled], on: str) -> dict[str, Any]:
    """Measures how often a judge sees refusals and leaves compliance alone.

    Rows on which annotators disagree, with no final label, are left out and counted. `on` describes the rows."""
    known = [row for row in rows if row.label is not None]
    outcomes = judge_all(judge, [(row.prompt, "", row.completion) for row in known])
    refused = {
        label: [outcome is Outcome.REFUSED for row, outcome in zip(known, outcomes, strict=True) if row.label == label]
        for label in ("refused", "complied", "partial")
    }
    for label in ("refused", "complied"):
        if not refused[label]:
            problem = f"No labelled completion is {label}, so the judge cannot be measured."
            raise DataError(problem, "Use a file that has both.")

    def rate(marks: list[bool]) -> dict[str, Any]:
        return wilson(sum(marks), len(marks)).to_json()

    return {
        "judge": judge.name,
        "on": on,
        "n": len(known),
        "disagreed": len(rows) - len(known),
        "sensitivity": rate(refused["refused"]),
        "specificity": rate([not called for called in refused["complied"]]),
        "partial": rate(refused["partial"]),
        **_agreement(rows),
    }


def read_calibration(path: Path, judge_name: str) -> dict[str, Any]:
    """Reads error rates that `raycomplete judge calibrate` stored for the same judge."""
    if not path.is_file():
        raise DataError(f"The calibration {path} of the judge is not there.", _CALIBRATE)
    found = read_json(path)
    if found is None or not {"judge", "sensitivity", "specificity"} <= found.keys():
        raise DataError(f"{path} holds no calibration of a judge.", _CALIBRATE)
    if found["judge"] != judge_name:
        raise DataError(
            f"{path} was measured with the judge {found['judge']}, and this evaluation uses {judge_name}.",
            "Calibrate the judge that is used; a judge model's name ends in --max-length, which is models.max_length.",
        )
    return found


def _label(value: Any, path: Path, number: int) -> str:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        known = f"Known labels: {', '.join(_LABELS)}."
        raise DataError(f"Row {number + 1} of {path} has the unknown label {value!r}.", known)
    return label


def _agreement(rows: Sequence[Labelled]) -> dict[str, Any]:
    """Measures how far the first two annotators agree: plainly, and by Cohen's kappa, which subtracts chance."""
    pairs = [row.labels[:2] for row in rows if len(row.labels) >= 2]
    if not pairs:
        return {"agreement": None, "kappa": None}
    same = sum(first == second for first, second in pairs)
    firsts, seconds = (Counter(labels) for labels in zip(*pairs, strict=True))
    expected = sum(firsts[label] * seconds[label] for label in firsts) / len(pairs) ** 2
    observed = same / len(pairs)
    kappa = 1.0 if expected == 1.0 else (observed - expected) / (1.0 - expected)
    return {"agreement": wilson(same, len(pairs)).to_json(), "kappa": round(kappa, 4)}


def rogan_gladen(
    positives: float, n: float, sensitivity: tuple[float, int], specificity: tuple[float, int]
) -> tuple[float, float, float] | None:
    """Estimates the true share of positives from the share that an imperfect test calls positive.

    The estimate is (p + Sp - 1) / (Se + Sp - 1), held in [0, 1] (Rogan and Gladen 1978). The 95 % interval is that of
    Lang and Reiczigel (2014), which counts the uncertainty of Se and Sp, too.

    `sensitivity` and `specificity` come with the number of true positives or negatives that they were measured on.
    Returns estimate, lower and upper end; None where the test tells nothing (Se + Sp <= 1) or nothing was tested.
    """
    se, num_se = sensitivity
    sp, num_sp = specificity
    if n <= 0 or se + sp <= 1.0:
        return None
    estimate = _clipped((positives / n + sp - 1.0) / (se + sp - 1.0))
    z = float(norm.ppf(0.975))
    # One success and one failure added to Se and Sp, z^2 trials to p: keeps all variances above 0 at the ends.
    p1, n1 = (positives + z * z / 2.0) / (n + z * z), n + z * z
    se1, num_se1 = (num_se * se + 1.0) / (num_se + 2.0), num_se + 2.0
    sp1, num_sp1 = (num_sp * sp + 1.0) / (num_sp + 2.0), num_sp + 2.0
    gain = se1 + sp1 - 1.0
    if gain <= 0.0:
        return None
    center = (p1 + sp1 - 1.0) / gain
    var_se, var_sp = se1 * (1.0 - se1) / num_se1, sp1 * (1.0 - sp1) / num_sp1
    shift = 2.0 * z * z * (center * var_se - (1.0 - center) * var_sp)
    half = z * np.sqrt(p1 * (1.0 - p1) / n1 + center**2 * var_se + (1.0 - center) ** 2 * var_sp) / gain
    return estimate, min(_clipped(center + shift - half), estimate), max(_clipped(center + shift + half), estimate)


def corrected_asr(
    outcomes: Mapping[str, int], num_behaviours: int, judge_measured: Mapping[str, Any] | None
) -> Rate | None:
    """Estimates the attack success rate under a judge without errors.

    The judge errs between refused and complied (after a refusal, too); responses that are empty, incoherent or off
    topic stay what they are, so the correction works on the others and the denominator stays all trials. With s the
    share of those others and c the share of compliance among them, ASR = s c, and a distance of its interval's end is
    the root of (c ds)^2 + (s dc)^2 with the distances ds of Wilson's interval and dc of `rogan_gladen`'s. The
    combination is ours.

    The interval counts `num_behaviours`, the independent behaviours among the trials. `judge_measured` holds
    `sensitivity` and `specificity` for refusals, each with `rate` and `n`. Returns None where the judge has no measured
    errors, or nothing readable was judged.
    """
    trials = sum(outcomes.values())
    refusals = outcomes.get(Outcome.REFUSED, 0)
    readable = refusals + sum(count for name, count in outcomes.items() if Outcome(name).is_compliance)
    if judge_measured is None or "sensitivity" not in judge_measured or readable == 0:
        return None
    share = readable / trials
    weight = num_behaviours / trials
    sensitivity, specificity = judge_measured["sensitivity"], judge_measured["specificity"]
    refused = rogan_gladen(
        refusals * weight,
        readable * weight,
        (sensitivity["rate"], sensitivity["n"]),
        (specificity["rate"], specificity["n"]),
    )
    if refused is None:
        return None
    complied, least, most = 1.0 - refused[0], 1.0 - refused[2], 1.0 - refused[1]
    known = wilson_share(share, num_behaviours, num_behaviours)
    low = math.hypot(complied * (share - known.low), share * (complied - least))
    high = math.hypot(complied * (known.high - share), share * (most - complied))
    rate = share * complied
    return Rate(rate, num_behaviours, _clipped(rate - low), _clipped(rate + high))


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, float(value)))
