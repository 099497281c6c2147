"""Attacks that sample answers: a grid of decoding settings, and Best-of-N.

The grid (Huang et al., arXiv 2310.06987) asks the same question under many sampling settings. Best-of-N (Hughes et al.,
arXiv 2412.03556) asks again and again, in other letters each time, until an answer comes: with strength s, a word of
more than three letters has its inner letters shuffled with probability s^(1/2), a letter changes its case with s^(1/2),
and a character is replaced by its neighbour in ASCII with s^3, the authors' values.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import (
    FIRST_COMPLIED,
    UNREADABLE,
    UNUSED_WORDINGS,
    Decoding,
    Emit,
    Response,
    Trial,
    TrialCost,
)
from raycomplete.runtime.files import content_hash
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


_MAX_SAMPLES = 10_000


class BestOfNConfig(AttackConfig):
    """The prompt in random capitals, scrambled words and noise (Best-of-N, Hughes et al., arXiv 2412.03556)."""

    standard: ClassVar[Mapping[str, Any]] = {"samples": _MAX_SAMPLES}
    batch: ClassVar[int] = 64  # questions asked at a time; an answer ends the rest
    strength: ClassVar[float] = 0.4  # of the augmentations
    temperature: ClassVar[float] = 1.0

    name: Literal["best_of_n"] = "best_of_n"
    samples: int = Field(_MAX_SAMPLES, ge=1, le=_MAX_SAMPLES, description="questions to each behaviour, at most")


@register(BestOfNConfig)
class BestOfNAttack(Attack[BestOfNConfig]):
    """Asks until the judge sees compliance or the samples are spent. `stats`: queries, those of the plain prompt."""

    rewrites_prompts = True

    @property
    def best_of(self) -> int:
        return self.config.samples

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        return TrialCost(len(trials), self.config.samples * super().cost(trials).tokens)

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        settings = self.config.model_dump(mode="json") | self.config.constants("strength", "temperature")
        # A draw that does not fit is replaced by the plain prompt.
        settings |= {"judge": target.judge.name, "max_length": target.max_length}
        decoding = Decoding(target.max_tokens, temperature=self.config.temperature)
        return [
            Trial(self.name, self.name, prompt, tuple(prompt.encoded(target.codec)), decoding, settings=settings)
            for prompt in prompts
        ]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        for trial in trials:
            emit([(trial, self._best(target, trial))])

    def _best(self, target: Target, trial: Trial) -> Response:
        """Returns the first response that complied, else the last one; each sample has a seed of its own."""
        seed = int(content_hash([self.name, trial.prompt.prompt_id])[:9], 16) * 2**20
        first, unused, unreadable = 0.0, 0, 0
        for start in range(0, self.config.samples, self.config.batch):
            numbers = range(start, min(start + self.config.batch, self.config.samples))
            texts = [augmented(trial.prompt.text, self.config.strength, random.Random(seed + n)) for n in numbers]
            sequences = self._fitting(target, trial, texts)
            drawn = target.draw(sequences, trial.decoding, seed + start)
            responses = [target.response(ids, (), new) for ids, new in zip(sequences, drawn, strict=True)]
            verdicts = target.judged([(trial, response) for response in responses])
            complied = [verdict.sure.is_compliance for verdict in verdicts]
            first = float(complied[0]) if start == 0 else first
            place = complied.index(True) if any(complied) else len(complied) - 1
            asked = zip(sequences[: place + 1], texts, strict=False)
            unused += sum(tuple(ids) == trial.sequence and text != trial.prompt.text for ids, text in asked)
            unreadable += sum(verdict.unreadable for verdict in verdicts[: place + 1])
            if any(complied):
                break
        stats = {"queries": start + place + 1, FIRST_COMPLIED: first, UNUSED_WORDINGS: unused, UNREADABLE: unreadable}
        return replace(responses[place], stats=stats, verdict=verdicts[place])

    def _fitting(self, target: Target, trial: Trial, texts: Sequence[str]) -> list[list[int]]:
        """Encodes augmented prompts, which take more tokens than the plain one; what does not fit is asked plainly."""
        room = target.room(trial.decoding.max_tokens)
        encoded = trial.prompt.encoded_all(target.codec, texts)
        return [ids if len(ids) <= room else list(trial.sequence) for ids in encoded]


def augmented(text: str, strength: float, rng: random.Random) -> str:
    """Shuffles the inner letters of words, changes the case of letters, and replaces characters by their neighbours."""
    often, seldom = strength**0.5, strength**3
    words = [_shuffled(word, rng) if len(word) > 3 and rng.random() < often else word for word in text.split()]
    letters = [
        letter.swapcase() if letter.isascii() and letter.isalpha() and rng.random() < often else letter
        for letter in " ".join(words)
    ]
    return "".join(_neighbour(letter, rng) if rng.random() < seldom else letter for letter in letters)


def _shuffled(word: str, rng: random.Random) -> str:
    inner = list(word[1:-1])
    rng.shuffle(inner)
    return f"{word[0]}{''.join(inner)}{word[-1]}"


def _neighbour(letter: str, rng: random.Random) -> str:
    """Moves a printable ASCII character by one place; others, and what would leave the range, stay."""
    moved = ord(letter) + rng.choice((-1, 1))
    return chr(moved) if letter.isascii() and letter.isprintable() and 32 <= moved <= 126 else letter
