"""Every rate of a run as one flat table, for spreadsheets, programs and model cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raycomplete.evaluation.summary import OTHER_RATES, defence_name
from raycomplete.report.run_folder import RunFolder

COLUMNS = ("role", "measure", "attack", "variant", "value", "low", "high", "n", "defence")


def rate_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Lists every number of a run's evaluation that has an interval.

    Returns:
        Mappings with `COLUMNS`: `measure` is asr (success of an attack), asr_worst_of_n, utility, over_refusal,
        benign_refusal, benign_nll (nats a token), or accuracy of a benchmark, which `attack` names then. `variant` is a
        depth of the prefill (`prefill-4`), another variant of an attack, or the file of borderline prompts; empty for
        the whole. `low` and `high` end the 95 % interval, `n` counts the prompts.
        `defence` names the defence at inference that stood around the student; empty for other models and without one.
    """
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
        if "nats_per_token" in nll:  # beside the roles stands their comparison
            yield (role, "benign_nll", "", ""), _numbers(nll, "nats_per_token")
    for name, by_role in (summary.get("capabilities") or {}).items():
        for role, found in by_role.items():
            yield (role, "accuracy", name, ""), _numbers(found["accuracy"])


def _numbers(rate: Mapping[str, Any], key: str = "rate") -> tuple[Any, ...]:
    if not rate["n"]:  # nobody was asked: 0 would be no measurement
        return None, None, None, 0
    return rate[key], rate["low"], rate["high"], rate["n"]
