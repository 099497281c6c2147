"""Soft prompt (Schwinn et al., arXiv 2402.09063): the suffix is searched in the space of embeddings, not among tokens.

The signed gradient of the target's loss moves every coordinate of the suffix by one step. No text has such embeddings,
so this is a bound on what any suffix can do, against an attacker who holds the weights. As its authors do, the attack
asks the model after every few steps: the loss of the target goes on falling after the answers have become worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import MAX_STEPS
from raycomplete.attacks.registry import register
from raycomplete.attacks.suffix import SuffixAttack, SuffixConfig, side_by_side
from raycomplete.attacks.target import FloatArray, Target, WhiteBox
from raycomplete.attacks.trial import Decoding, Emit, Response, Trial, TrialCost
from raycomplete.runtime.types import Prompt


class SoftPromptConfig(SuffixConfig):
    """Continuous suffix, found by gradient (Schwinn et al., arXiv 2402.09063). Standard: 100 steps, 20 tokens."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "steps": 100}

    name: Literal["soft_prompt"] = "soft_prompt"
    steps: int = Field(100, ge=1, le=MAX_STEPS, description="steps of the search")
    lr: float = Field(
        0.05, gt=0, description="step of a coordinate, as a share of the root mean square of the embedding's entries"
    )
    ask_every: int = Field(10, ge=1, description="steps after which the model is asked; each is a variant")

    def reduced_because(self, num_behaviours: int) -> list[str]:
        """Adds where the model is asked more seldom: the best of fewer answers is worse."""
        seldom = [f"asked every {self.ask_every} steps instead of 10"] if self.ask_every > 10 else []
        return super().reduced_because(num_behaviours) + seldom

    @property
    def asked_after(self) -> list[int]:
        """Steps after which the model is asked."""
        return sorted({*range(self.ask_every, self.steps, self.ask_every), self.steps})


@register(SoftPromptConfig)
class SoftPromptAttack(SuffixAttack[SoftPromptConfig]):
    """Asks under a variant `step-<steps>` for each state of the suffix.

    `worst_of_n` is the rate of an attacker who takes the best of them, as published rates are. The white box answers
    greedily itself. `stats` of a response: loss at the start and least loss until then.
    """

    rate_is_worst = True

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        plain, searches = super().cost(trials), len({trial.prompt.prompt_id for trial in trials})
        longest = max((trial.decoding.max_tokens for trial in trials), default=0)
        return replace(plain, passes=searches * longest, gradients=searches * self.config.steps)

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        shared = self.config.model_dump(mode="json", exclude={"steps", "ask_every"})
        started = [(prompt, self.start(target.answering, prompt)) for prompt in prompts]
        decoding = Decoding(target.max_tokens)
        return [
            Trial(self.name, f"step-{step}", prompt, found.sequence, decoding, settings=settings)
            for step in self.config.asked_after
            for prompt, found in started
            for settings in [{**shared, "step": step, "target_ids": found.problem.target}]
        ]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        by_prompt = sorted(trials, key=lambda trial: (trial.prompt.prompt_id, trial.settings["step"]))
        searches = [list(group) for _, group in groupby(by_prompt, key=lambda trial: trial.prompt.prompt_id)]
        for asked, responses in side_by_side(target, searches, self._searched):
            emit(list(zip(asked, responses, strict=True)))

    def _searched(self, target: Target, box: WhiteBox, asked: Sequence[Trial]) -> list[Response]:
        """Searches the suffix of one behaviour, and asks the model once for all states of it that are wanted."""
        found = self.start(target.answering, asked[0].prompt)
        suffix_SH = box.suffix_embeddings(found.best)
        states: list[FloatArray] = []
        losses: list[float] = []
        least: list[float] = []
        for before, step in pairwise([0, *(int(trial.settings["step"]) for trial in asked)]):
            target.stop_if_cancelled()
            suffix_SH, fallen = box.descend(found.problem, suffix_SH, step - before, self.config.lr)
            losses += fallen
            states.append(suffix_SH)
            least.append(min(losses))
        target.stop_if_cancelled()
        max_tokens, eos_ids = asked[0].decoding.max_tokens, sorted(target.codec.eos_ids)
        answers = box.continue_embeddings(found.problem, states, max_tokens, eos_ids)
        stats = {"loss_start": round(losses[0], 4)}
        return [
            Response(trial.sequence, (), tuple(new), {**stats, "loss_best": round(loss, 4)})
            for trial, new, loss in zip(asked, answers, least, strict=True)
        ]
