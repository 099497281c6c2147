"""The evaluation's part of summary.json, from the results of up to three models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raycomplete.evaluation.comparison import paired_bootstrap
from raycomplete.evaluation.safety_regressions import safety_regressions
from raycomplete.runtime.types import MODEL_ROLES

_COMPARED = (("student", "aligned"), ("aligned", "base"))


def summarize(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Headline numbers.

    Args:
        results: What `evaluate_model` returned, by role. Roles that were not evaluated may be absent.

    Returns:
        `asr`, `asr_reduction`, `utility`, `over_refusal`, `benign_refusal`, `over_refusal_by_source` by file and role,
        `judge`, `judge_measured`, `attacks` by attack and role, `capabilities` by benchmark and role, `comparisons` of
        models on the same behaviours, and `safety_regressions`, sentences on models that refuse harmless prompts or lost utility.
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
    summary["over_refusal_by_source"] = _by_name(results, roles, "over_refusal_by_source")
    summary["judge"] = judges.pop() if judges else None
    summary["judge_measured"] = results[roles[0]].get("judge_measured") if roles else None
    summary["attacks"] = {
        name: {role: _without_behaviours(block) for role, block in by_role.items()}
        for name, by_role in _by_name(results, roles, "attacks").items()
    }
    summary["comparisons"] = comparisons(results)
    summary["capabilities"] = _by_name(results, roles, "capabilities")
    summary["safety_regressions"] = safety_regressions({role: results[role] for role in roles})
    return summary


def asr_reduction(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """1 - student mean / aligned mean; see `summarize`."""
    if "student" not in results or "aligned" not in results:
        return None
    aligned = float(results["aligned"]["asr"]["mean"]["rate"])
    student = float(results["student"]["asr"]["mean"]["rate"])
    return 1.0 - student / aligned if aligned > 0 else None


def comparisons(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Student against aligned and aligned against base, attack by attack, where both answered the same under it.

    Raises:
        ValueError: The settings of an attack differ between two models.
    """
    found = []
    for first, second in _COMPARED:
        if first not in results or second not in results:
            continue
        ours, theirs = results[first].get("attacks", {}), results[second].get("attacks", {})
        for name in [name for name in ours if name in theirs]:
            if ours[name]["settings"] != theirs[name]["settings"]:
                raise ValueError(f"Results of {name} under different settings cannot be compared.")
            difference = paired_bootstrap(ours[name]["by_behaviour"], theirs[name]["by_behaviour"])
            found.append({"attack": name, "first": first, "second": second, **difference.to_json()})
    return found


def _by_name(
    results: Mapping[str, Mapping[str, Any]], roles: Sequence[str], section: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """name -> role -> block."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for role in roles:
        for name, block in results[role].get(section, {}).items():
            found.setdefault(name, {})[role] = block
    return found


def _without_behaviours(block: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "by_behaviour"}
