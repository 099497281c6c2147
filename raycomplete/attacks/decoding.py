"""Decoding grid: the same question under many sampling settings (Huang et al., arXiv 2310.06987)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raycomplete.attacks.attack import Attack
from raycomplete.attacks.settings import DecodingAttack
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.runtime.types import Prompt


class DecodingGrid(Attack[DecodingAttack]):
    """A variant for each setting. `mean` is the rate of one draw, `worst_of_n` that of one who tries them all."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        sequences = [tuple(target.codec.encode_prompt(prompt.text)) for prompt in prompts]
        return [
            Trial("decoding", variant, prompt, sequence, decoding, seed=draw, position=position)
            for variant, decoding in self._settings(target.max_tokens)
            for draw in range(self.config.samples)
            for position, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True))
        ]

    def _settings(self, max_tokens: int) -> Iterator[tuple[str, Decoding]]:
        for value in self.config.temperatures:
            yield f"temperature-{value:g}", Decoding(max_tokens, temperature=value)
        for value in self.config.top_ps:
            yield f"top_p-{value:g}", Decoding(max_tokens, temperature=1.0, top_p=value)
        for count in self.config.top_ks:
            yield f"top_k-{count}", Decoding(max_tokens, temperature=1.0, top_k=count)
