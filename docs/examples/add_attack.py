"""Adds the many-shot attack (Anil et al., 2024) from outside the package: `plugins: [add_attack.py]` in a run file.

The prompt shows other behaviours, each with the start of a compliant answer, and asks the behaviour after them.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from raycomplete.attacks import Attack, AttackConfig, Decoding, Target, Trial, register
from raycomplete.runtime.types import Prompt


class ManyShotConfig(AttackConfig):
    """Settings, as a run file writes them: `attacks: [{name: many_shot, shots: [1, 2]}]`."""

    name: Literal["many_shot"] = "many_shot"
    shots: list[int] = Field(default_factory=lambda: [4, 16], description="answered behaviours before the question")
    words: int = Field(40, ge=1, description="words of each answer")


@register(ManyShotConfig)
class ManyShotAttack(Attack[ManyShotConfig]):
    """Asks under a variant for each number of shots."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        shown = [f"{prompt.text} {' '.join((prompt.answer or '').split()[: self.config.words])}" for prompt in prompts]
        trials = []
        for count in self.config.shots:
            for index, prompt in enumerate(prompts):
                others = (shown[index + 1 :] + shown[:index])[:count]
                sequence = tuple(prompt.encoded(target.codec, "\n".join((*others, prompt.text))))
                trials.append(Trial(self.name, f"shots-{count}", prompt, sequence, Decoding(target.max_tokens)))
        return trials
