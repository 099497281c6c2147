"""Traps for judges: answers, harmless in content and written for this package, whose outcome is plain to a reader.

Refusing words that refuse nothing, refusals that help all the same, answers to something else, babble. Half of them (by
a hash of their text) were looked at while the pattern judge was tuned. The other half was not, but its totals were
seen, and seven of its traps were read later, when refusals that break off a list, verse or code were mended.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from raycomplete.attacks.target import judge_all
from raycomplete.evaluation.judges import measured
from raycomplete.evaluation.statistics import wilson
from raycomplete.runtime.types import Judge, Outcome, Prompt

Split = Literal["tuning", "held_out"]
SPLITS: tuple[Split, ...] = ("tuning", "held_out")


@dataclass(frozen=True, slots=True)
class Trap:
    """A response, and its outcome as a reader sees it."""

    split: Split
    tag: str
    prompt: Prompt
    prefill: str
    response: str
    outcome: Outcome


@cache
def read_traps() -> tuple[Trap, ...]:
    """Reads the traps that come with the package."""
    lines = files(__package__).joinpath("traps.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(
        Trap(
            row["split"],
            row["tag"],
            Prompt(row["id"], row["prompt"], "harmful"),  # in the part of one: the model may refuse it
            row["prefill"],
            row["response"],
            Outcome(row["outcome"]),
        )
        for row in map(json.loads, lines)
    )


def trap_errors(judge: Judge) -> dict[str, Any] | None:
    """Measures how often a judge is right on the traps, half by half.

    Returns:
        By half: `right` (the very outcome), `compliance` (compliance, after a refusal too, counted as success of the
        attack), `no_compliance` (anything else counted as none), and `outcomes` as [right, n]. Rates have Wilson's 95 %
        interval. None for judges of harm: the traps hold none.
    """
    if getattr(judge, "rates_harm", False):
        return None
    found: dict[str, Any] = {}
    for split in SPLITS:
        traps = [trap for trap in read_traps() if trap.split == split]
        said = judge_all(judge, [(trap.prompt, trap.prefill, trap.response) for trap in traps])
        found[split] = _errors(list(zip(traps, said, strict=True)))
    return found


def measured_on_traps(judge: Judge) -> Judge:
    """Returns the same judge, which publishes its errors on the traps beside those against people."""
    found: Any = copy.copy(judge)
    found.measured = {**(measured(judge) or {}), "traps": trap_errors(judge)}
    return cast("Judge", found)


def _errors(pairs: Sequence[tuple[Trap, Outcome]]) -> dict[str, Any]:
    def rate(marks: list[bool]) -> dict[str, Any]:
        return wilson(sum(marks), len(marks)).to_json()

    right, asked = (
        Counter(trap.outcome for trap, said in pairs if said is trap.outcome),
        Counter(trap.outcome for trap, _ in pairs),
    )
    return {
        "right": rate([said is trap.outcome for trap, said in pairs]),
        "compliance": rate([said.is_compliance for trap, said in pairs if trap.outcome.is_compliance]),
        "no_compliance": rate([not said.is_compliance for trap, said in pairs if not trap.outcome.is_compliance]),
        "outcomes": {str(outcome): [right[outcome], asked[outcome]] for outcome in Outcome},
    }
