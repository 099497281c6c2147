"""Prefill by depth: the attacker writes the first tokens of a compliant answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import Attack, AttackConfig, answer_ids, require_answers
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.runtime.types import Codec, Prompt

STANDARD_DEPTHS = (0, 4, 8, 16, 32, 64, 100, 200, 500)  # of prompts whose compliant answer is that long

Depth = Annotated[int, Field(ge=0)]


class PrefillConfig(AttackConfig):
    """The first tokens of a compliant answer stand at the start of the response (the depth curve)."""

    standard: ClassVar[Mapping[str, Any]] = {"depths": list(STANDARD_DEPTHS)}

    name: Literal["prefill"] = "prefill"
    depths: list[int] = Field(default_factory=list, description="those of evaluation.depths, filled in at work")


@register(PrefillConfig)
class PrefillAttack(Attack[PrefillConfig]):
    """Asks under a variant for each depth; an evaluation leaves out the prompts whose answer is shorter than it."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        if max(self.config.depths) > 0:
            require_answers(prompts, "so there is nothing to prefill", "evaluate depth 0 only")
        codec, answering = target.codec, target.answering
        decoding = Decoding(target.max_tokens)
        trials = []
        for depth in self.config.depths:
            for prompt in prompts:
                given = tuple(answer_ids(codec, prompt)[:depth])
                sequence = (*prompt.encoded(answering if depth else codec), *given)  # at 0 a model may think first
                variant, settings = f"prefill-{depth}", {"depth": depth}
                trials.append(Trial(self.name, variant, prompt, sequence, decoding, given, settings=settings))
        return trials

    def reduced_because(self, codec: Codec, prompts: Sequence[Prompt]) -> list[str]:
        """Leaves out standard depths that no answer reaches, and names those that fewer than half reach."""
        goes_on = any(prompt.answer_goes_on for prompt in prompts)
        lengths, asked = [len(answer_ids(codec, prompt)) for prompt in prompts], self.config.depths
        reached = {depth: sum(length >= depth for length in lengths) for depth in STANDARD_DEPTHS}
        beyond = [depth for depth, count in reached.items() if not count and not goes_on and depth not in asked]
        few = [depth for depth, count in reached.items() if depth in asked and 0 < count < len(prompts) / 2]
        reasons = self.config.model_copy(update={"depths": [*asked, *beyond]}).reduced_because(len(prompts))
        return reasons + [f"depth {depth} on {reached[depth]} prompts" for depth in few]
