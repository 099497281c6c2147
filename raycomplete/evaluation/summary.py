"""The evaluation's part of summary.json, from the results of up to three models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycomplete.types import MODEL_ROLES


def summarize(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Headline numbers.

    Args:
        results: What `evaluate_model` returned, by role. Roles that were not evaluated may be absent.

    Returns:
        `asr`, `asr_reduction`, `utility`, `over_refusal`, `benign_refusal`, `judge` and `judge_measured`.
        `asr_reduction` is 1 - student mean / aligned mean: None where one of the two is absent or the aligned mean is
        0, negative where the student is attacked more easily than the aligned model.

    Raises:
        ValueError: The results come from different judges or settings and must not be compared.
    """
    roles = [role for role in MODEL_ROLES if role in results]
    judges = {str(results[role]["judge"]) for role in roles}
    if len(judges) > 1:
        raise ValueError(f"Results of different judges cannot be compared: {', '.join(sorted(judges))}.")
    if len({tuple(results[role]["asr"]["by_depth"]) for role in roles}) > 1:
        raise ValueError("Results at different prefill depths cannot be compared.")
    summary: dict[str, Any] = {
        "asr": {
            role: {"by_depth": dict(results[role]["asr"]["by_depth"]), "mean": results[role]["asr"]["mean"]}
            for role in roles
        },
        "asr_reduction": asr_reduction(results),
    }
    for name in ("utility", "over_refusal", "benign_refusal"):
        summary[name] = {role: results[role][name] for role in roles}
    summary["judge"] = judges.pop() if judges else None
    summary["judge_measured"] = results[roles[0]].get("judge_measured") if roles else None
    return summary


def asr_reduction(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """1 - student mean / aligned mean; see `summarize`."""
    if "student" not in results or "aligned" not in results:
        return None
    aligned = float(results["aligned"]["asr"]["mean"]["rate"])
    student = float(results["student"]["asr"]["mean"]["rate"])
    return 1.0 - student / aligned if aligned > 0 else None
