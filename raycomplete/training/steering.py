"""The rules by which held-back training prompts steer a run: factors on loss weights, and the step that is kept.

Nothing here reads a model. `raycomplete.training.validation` measures, and no prompt of the evaluation is among what it
reads. The rules are ours, not those of arXiv 2511.12155.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raycomplete.config.training import ValidationConfig

ANCHOR, OPENING, PUSH = "anchor", "opening", "push_forward"
STEERED = (ANCHOR, OPENING, PUSH)
"""Loss terms whose weights are moved, where a method has them."""

_MEMORY = 0.5  # of the running means: a few dozen answers are noisy, and a run has only a few measurements
_FALLING = 0.75  # compliance below this share of what it was falls by itself: more weight would overshoot


@dataclass(frozen=True)
class StepMeasurement:
    """The student after a step, on held-back training prompts.

    Attributes:
        step: Finished steps.
        complied: Depths of h with the number of harmful prompts that the student complied with, and of those asked.
        refusals: Harmless prompts that the student refuses and aligned does not, less those the other way round.
        harmless: Harmless prompts asked.
        kl: KL(aligned || student) along aligned's answers to harmless prompts, nats a token.
        in_reach: Share of the positions of h, the first left out, where base's likeliest token is among the student's
            20 likeliest. Greedy answers say nothing of it, and an attacker who picks among those tokens lives on it.
        changed: Harmless prompts that one of student and aligned refuses, and the other does not.
        unfinished: Mean unfinished mass at the same positions: the student's probability of base-favored tokens. It is
            noted, and decides nothing.
    """

    step: int
    complied: tuple[tuple[int, int, int], ...]
    refusals: int
    harmless: int
    kl: float
    in_reach: float = 0.0
    changed: int = 0
    unfinished: float | None = None

    @property
    def asked(self) -> int:
        """Answers to harmful prompts, at all depths."""
        return sum(asked for _, _, asked in self.complied)

    @property
    def compliance(self) -> float:
        """Share of them that comply."""
        return sum(complied for _, complied, _ in self.complied) / max(self.asked, 1)

    @property
    def over_refusal(self) -> float:
        """Net change of the share of harmless prompts refused, student less aligned."""
        return self.refusals / self.harmless


def excesses(config: ValidationConfig, found: StepMeasurement) -> tuple[float, float]:
    """Returns over-refusal and KL, each as a multiple of what is allowed.

    Where c answers changed sides by chance alone, their net change has the standard deviation sqrt(c). Over-refusal
    counts beyond that only: of a few dozen prompts, of which aligned refuses many itself, several change at any step,
    and that is no evidence. A share of n prompts moves in steps of 1 / n, so one prompt is
    allowed however small the budget. A KL that is no number exceeds every budget.
    """
    beyond_chance = found.refusals - math.sqrt(found.changed)
    kl = math.inf if math.isnan(found.kl) else found.kl
    return beyond_chance / max(config.over_refusal_budget * found.harmless, 1.0), kl / config.kl_budget


def violation(config: ValidationConfig, found: StepMeasurement) -> float:
    """Says by how much a step breaks its budgets: the sum of both excesses above 1; 0 where it meets them."""
    return sum(max(excess - 1, 0.0) for excess in excesses(config, found))


def choice_key(config: ValidationConfig, found: StepMeasurement) -> tuple[float, float, float, float]:
    """Returns the order of preference, smaller is better: least violation, compliance, base's words in reach, and
    then KL.

    Compliance falls to 0 early in a run, and base's words in reach go on falling. They count within the budgets only.
    """
    broken = violation(config, found)
    return broken, found.compliance, 0.0 if broken > 0 else found.in_reach, found.kl


def moved_factors(
    config: ValidationConfig,
    factors: Mapping[str, float],
    over_refusal: float,
    kl: float,
    now: Mapping[str, float],
    before: Mapping[str, float] | None,
) -> dict[str, float]:
    """Applies the rules once and returns the new factors, bounded; terms that are not among `factors` are skipped.

    - A budget is broken: the anchor's factor rises and that of push-forward falls, by as much as the budget is
      exceeded. Push-forward says "refuse" at every position of h, and what it costs is KL on harmless text. The
      opening's factor falls only where over-refusal is what is broken: it acts on the tokens that decide between
      answer and refusal.
    - Both are met: the anchor's factor returns to 1, and so do the others from below, since greedy answers say nothing
      of the unlikely tokens that push-forward is for; at the full rate, since what breaks a budget early in a run is
      over soon. Where compliance remains after h the factor of push-forward rises, where it remains at the opening
      (depth 0) that of the opening. What falls by itself is left alone, or early measurements, when nothing is learned
      yet, would drive factors to their bounds.

    Args:
        config: Rate and bounds.
        factors: Present factors by term.
        over_refusal: As a multiple of what is allowed, at this measurement.
        kl: The same.
        now: Running means of the number of answers that comply, "opening" at depth 0 and "depth" deeper.
        before: The same after the measurement before; None at the first.
    """
    broken = max(over_refusal, kl) - 1
    moves: dict[str, float] = {}
    if broken > 0:
        size = min(broken, 1.0)
        moves = {ANCHOR: size, PUSH: -size}
        if over_refusal > 1:
            moves[OPENING] = -size
    else:
        for name, seen in ((OPENING, "opening"), (PUSH, "depth")):
            if before is not None and now[seen] >= max(1.0, _FALLING * before[seen]):
                moves[name] = 1.0
    found = {}
    for name, factor in factors.items():
        low = 1.0 if name == ANCHOR else 1 / config.max_factor  # within its budgets, too, the anchor shapes the student
        if name in moves or broken > 0:
            wanted = factor * math.exp(config.rate * moves.get(name, 0.0))
        elif name == ANCHOR:
            wanted = factor * math.exp(-config.rate)
        else:
            wanted = max(factor, min(factor * math.exp(config.rate), 1.0))
        found[name] = min(max(wanted, low), config.max_factor)
    return found


class Steering:
    """Moves factors on loss weights after each measurement, and remembers the step that is to be kept.

    Args:
        config: Budgets, rate and bounds.
        weights: Weights of the loss in the run file, by term; terms that are absent or 0 are not steered.

    Attributes:
        factors: Factor on the weight of each steered term.
        best: StepMeasurement of the step to keep so far.
    """

    def __init__(self, config: ValidationConfig, weights: Mapping[str, float]) -> None:
        self._config = config
        self.factors = {name: 1.0 for name in STEERED if weights.get(name, 0.0) > 0}
        self.best: StepMeasurement | None = None
        self._means: dict[str, float] | None = None
        self._since = 0

    @property
    def best_step(self) -> int:
        """Finished steps of the best measurement; 0 before the first."""
        return self.best.step if self.best is not None else 0

    @property
    def is_over(self) -> bool:
        """True once `patience` measurements in a row brought nothing better."""
        return 0 < self._config.patience <= self._since

    def update(self, found: StepMeasurement) -> dict[str, Any]:
        """Takes in a measurement, and returns it and the decisions, for metrics.jsonl."""
        config = self._config
        if self.best is None or choice_key(config, found) < choice_key(config, self.best):
            self.best, self._since = found, 0
        else:
            self._since += 1
        over_refusal, kl = excesses(config, found)
        seen = {
            "opening": float(sum(complied for depth, complied, _ in found.complied if depth == 0)),
            "depth": float(sum(complied for depth, complied, _ in found.complied if depth > 0)),
        }
        before = self._means
        self._means = (
            seen if before is None else {name: _MEMORY * before[name] + (1 - _MEMORY) * seen[name] for name in seen}
        )
        self.factors = moved_factors(config, self.factors, over_refusal, kl, self._means, before)
        return {
            "compliance": {str(depth): part / asked for depth, part, asked in found.complied},
            "compliance_n": {str(depth): asked for depth, _, asked in found.complied},
            "over_refusal": found.over_refusal,
            "over_refusal_changed": found.changed,
            "over_refusal_n": found.harmless,
            "kl": found.kl,
            "in_reach": found.in_reach,
            "unfinished_mass": found.unfinished,
            "of_budget": {"over_refusal": over_refusal, "kl": kl},
            "meets_budgets": violation(config, found) == 0,
            "best_step": self.best_step,
            "factors": dict(self.factors),
        }

    def describe_choice(self) -> str:
        """Says in one sentence which step is kept, and whether it meets the budgets."""
        found, config = self.best, self._config
        if found is None:
            return "The last step is kept: the weights of the best measured one are lost or damaged."
        allowed = max(config.over_refusal_budget, 1 / found.harmless)
        measured = (
            f"over-refusal {found.over_refusal:+.3f} against aligned ({found.changed} of {found.harmless} answers "
            f"changed sides; at most {allowed:.3f} beyond chance), KL {found.kl:.4f} nats a token (at most "
            f"{config.kl_budget:g}), compliance {found.compliance:.3f} (n = {found.asked}), base's words in reach of "
            f"an attacker {found.in_reach:.3f}"
        )
        if violation(config, found) == 0:
            return f"Step {found.step} is kept, the safest within the budgets on held-back prompts: {measured}."
        return (
            f"No measured step met the budgets on held-back prompts; step {found.step} breaks them least: {measured}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Factors, running means and the best measurement, as plain JSON types."""
        best = None if self.best is None else asdict(self.best)
        return {"factors": self.factors, "means": self._means, "best": best, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved run."""
        self.factors, self._means, self._since = dict(state["factors"]), state["means"], int(state["since"])
        best = state["best"]
        self.best = (
            None if best is None else StepMeasurement(**best | {"complied": tuple(map(tuple, best["complied"]))})
        )

    def forget_best(self) -> None:
        """The checkpoint of the best step is gone: the next measurement is the best, and patience begins anew."""
        self.best, self._since = None, 0
