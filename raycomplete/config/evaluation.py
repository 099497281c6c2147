"""Attacks and what is measured beside them."""

from __future__ import annotations

from pydantic import Field, field_validator

from raycomplete.config.section import Section


class EvaluationConfig(Section):
    """The prefill-depth curve, utility and over-refusal."""

    depths: list[int] = Field(default_factory=lambda: [0, 4, 8, 16, 32, 64], min_length=1)
    max_tokens: int = Field(64, ge=1, description="tokens that the model may add to a prefill")
    max_utility_tokens: int = Field(128, ge=1)
    prompts: int = Field(100, ge=1, description="held-out prompts of each kind")
    save_completions: bool = Field(False, description="keep what models said; never needed for the rates")

    @field_validator("depths")
    @classmethod
    def _sorted_unique(cls, depths: list[int]) -> list[int]:
        if any(depth < 0 for depth in depths):
            raise ValueError("evaluation.depths must not be negative")
        return sorted(set(depths))
