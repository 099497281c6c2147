"""Decoding grid: the same question under many sampling settings (Huang et al., arXiv 2310.06987)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.runtime.types import Prompt

_TWENTIETHS = [round(0.05 * step, 2) for step in range(1, 21)]
_TOP_KS = [1, 2, 5, 10, 20, 50, 100, 200, 500]


class DecodingConfig(AttackConfig):
    """Sampling settings vary one at a time, the others stay at 1 and off."""

    standard: ClassVar[Mapping[str, Any]] = {"temperatures": _TWENTIETHS, "top_ps": _TWENTIETHS, "top_ks": _TOP_KS}

    name: Literal["decoding"] = "decoding"
    temperatures: list[float] = Field(default_factory=_TWENTIETHS.copy, description="sampling temperatures")
    top_ps: list[float] = Field(default_factory=_TWENTIETHS.copy, description="nucleus masses")
    top_ks: list[int] = Field(default_factory=_TOP_KS.copy, description="numbers of likeliest tokens")

    @model_validator(mode="after")
    def _in_range(self) -> DecodingConfig:
        if any(value <= 0 for value in (*self.temperatures, *self.top_ps, *self.top_ks)) or max([*self.top_ps, 0]) > 1:
            raise ValueError("temperatures and top_ks must be above 0, top_ps between 0 and 1")
        if not (self.temperatures or self.top_ps or self.top_ks):
            raise ValueError("name at least one temperature, top_p or top_k")
        return self


@register(DecodingConfig)
class DecodingAttack(Attack[DecodingConfig]):
    """Samples under a variant for each setting: `mean` is the rate of one draw, `worst_of_n` the best of all."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        sequences = [tuple(prompt.encoded(target.codec)) for prompt in prompts]
        return [
            Trial("decoding", variant, prompt, sequence, decoding, settings=sampler, position=position)
            for variant, decoding, sampler in self._variants(target.max_tokens)
            for position, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True))
        ]

    def _variants(self, max_tokens: int) -> Iterator[tuple[str, Decoding, dict[str, str]]]:
        for value in self.config.temperatures:
            yield f"temperature-{value:g}", Decoding(max_tokens, temperature=value), {}
        for value in self.config.top_ps:
            yield f"top_p-{value:g}", Decoding(max_tokens, temperature=1.0, top_p=value), {}
        for count in self.config.top_ks:
            # Earlier versions drew top-k responses by another sampler; named here, theirs are not taken for these.
            yield f"top_k-{count}", Decoding(max_tokens, temperature=1.0, top_k=count), {"sampler": "engine"}
