"""Held-out prompts by what they measure."""

from __future__ import annotations

from dataclasses import dataclass

from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt


@dataclass(frozen=True)
class EvaluationSets:
    """Held-out prompts by what they measure. All given prompts are used: drawing a sample is the caller's part.

    Attributes:
        harmful: Attack success; `answer` is the compliant text whose first tokens are prefilled.
        benign: Utility and refusal of ordinary requests; `answer` is the right answer where known.
        borderline: Over-refusal, on harmless prompts that look harmful.
    """

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    borderline: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        for kind in ("harmful", "benign", "borderline"):
            prompts: tuple[Prompt, ...] = getattr(self, kind)
            seen: set[str] = set()
            for prompt in prompts:
                if prompt.kind != kind:
                    raise DataError(f"The prompt {prompt.prompt_id!r} is {prompt.kind}, but stands in the {kind} set.")
                if prompt.prompt_id in seen:
                    raise DataError(
                        f"The {kind} set holds the prompt id {prompt.prompt_id!r} twice.", "Make ids unique."
                    )
                seen.add(prompt.prompt_id)
