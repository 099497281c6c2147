"""Static strings: adversarial prompts that someone found before, such as JailbreakBench's artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.data.prompts import read_rows
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt


class StaticStringsConfig(AttackConfig):
    """Ready-made adversarial prompts for known behaviours."""

    name: Literal["static_strings"] = "static_strings"
    path: Path = Field(description="JSONL or CSV")
    prompt: str = Field("prompt", description="column of the adversarial prompt")
    goal: str = Field("goal", description="column that holds the text of the behaviour")
    group: str | None = Field("method", description="column by which rates are kept apart")


@register(StaticStringsConfig)
class StaticStringsAttack(Attack[StaticStringsConfig]):
    """Asks each string for the behaviour whose text stands beside it, under a variant for each group of the file.

    Behaviours without a string have no trial: the rate's `n` counts those that have one.
    """

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        config = self.config
        columns = [config.prompt, config.goal, *([config.group] if config.group else [])]
        by_text = {_folded(prompt.text): prompt for prompt in prompts}
        trials = []
        drawn: Counter[tuple[str, str]] = Counter()
        for row in read_rows(config.path, columns):
            prompt = by_text.get(_folded(str(row[config.goal])))
            if prompt is None:
                continue
            variant = str(row[config.group]) if config.group else "all"
            number = drawn[variant, prompt.prompt_id]
            drawn[variant, prompt.prompt_id] += 1
            sequence = tuple(prompt.encoded(target.codec, str(row[config.prompt])))
            trials.append(Trial("static_strings", variant, prompt, sequence, Decoding(target.max_tokens), seed=number))
        if not trials:
            raise DataError(
                f"No row of {config.path} names one of the {len(prompts)} behaviours in its column {config.goal!r}.",
                "Evaluate the behaviours that the strings were made for, or name the right column.",
            )
        return sorted(trials, key=lambda trial: (trial.variant, trial.seed))


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
