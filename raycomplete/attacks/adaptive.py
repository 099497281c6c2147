"""Attacks against raycomplete's own defence. The recovery that it trains starts a refusal in mid-answer, after a
compliant opening, at depths that training drew. So the attacker imitates the refusal and turns back, hides the answer
in an earlier turn, starts in the middle of the answer, and cuts at depths between the usual ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raycomplete.attacks.attack import Attack, answer_ids
from raycomplete.attacks.settings import AdaptiveAttack
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Codec, Prompt

_Words = tuple[list[int], list[int]]  # what the model reads, and the attacker's part of its answer
_Variant = tuple[str, int, _Words]  # its name, how many answer tokens it asks for, and the words


class Adaptive(Attack[AdaptiveAttack]):
    """Variants `cut-<depth>`, `refuse-then-turn-<depth>`, `middle-<depth>` and `multi-turn-<depth>`."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        answered = [prompt for prompt in prompts if prompt.answer]
        if not answered:
            raise DataError(
                "No harmful prompt has an answer, which the adaptive attack prefills.",
                "Name the answer column of data.evaluation.harmful, or leave the attack out.",
            )
        by_variant: dict[str, list[Trial]] = {}
        for prompt in answered:
            for variant, depth, (sequence, prefill) in self._variants(target.codec, prompt):
                by_variant.setdefault(variant, []).append(
                    Trial(
                        "adaptive",
                        variant,
                        prompt,
                        tuple(sequence),
                        Decoding(target.max_tokens),
                        prefill=tuple(prefill),
                        settings={"depth": depth},
                    )
                )
        return [trial for trials in by_variant.values() for trial in trials]

    def _variants(self, codec: Codec, prompt: Prompt) -> Iterator[_Variant]:
        asked, answer = codec.encode_prompt(prompt.text), answer_ids(codec, prompt)
        for depth in self.config.cuts:
            yield f"cut-{depth}", depth, ([*asked, *answer[:depth]], answer[:depth])
        for depth in self.config.depths:
            yield f"refuse-then-turn-{depth}", depth, self._turned(codec, asked, answer[:depth])
            middle = answer[depth : 2 * depth]
            if middle:  # an answer that ends before has none, and without it this were no attack
                yield f"middle-{depth}", depth, ([*asked, *middle], middle)
            yield f"multi-turn-{depth}", depth, self._two_turns(codec, asked, answer[:depth])

    def _turned(self, codec: Codec, asked: list[int], answer: list[int]) -> _Words:
        """A refusal, the turn, and the answer. The judge is told of the answer only: the refusal gives nothing away."""
        imitated = codec.encode_answer(f"{self.config.refusal} {self.config.turn} ")
        return [*asked, *imitated, *answer], answer

    def _two_turns(self, codec: Codec, asked: list[int], answer: list[int]) -> _Words:
        """An earlier turn that the attacker answered, and a plain question after it.

        The codec writes single turns only, so the second brings a default system prompt along where a template has one.
        """
        follow_up = codec.encode_prompt(self.config.follow_up)
        if follow_up.count(follow_up[0]) == 1:
            follow_up = follow_up[1:]  # a start token, which opens a chat once; turn markers come again in a prompt
        # What ends the user's turn ends the model's too; templates without such a token get any end of response.
        end = next((token for token in reversed(asked) if token in codec.eos_ids), min(codec.eos_ids))
        return [*asked, *answer, end, *follow_up], answer
