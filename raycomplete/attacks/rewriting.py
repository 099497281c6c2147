"""The base of attacks in which another model writes what the target is asked, round by round (PAIR, Crescendo)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field, field_validator

from raycomplete.attacks.attack import Attack, AttackConfig, plain_trials, runs
from raycomplete.attacks.target import Attacker, Target
from raycomplete.attacks.templates import fill_slots
from raycomplete.attacks.trial import Trial, TrialCost
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.types import Prompt


class RewritingConfig(AttackConfig):
    """Settings of the model that writes."""

    standard: ClassVar[Mapping[str, Any]] = {"max_tokens": 200}

    attacker: str | None = Field(
        None, description="checkpoint of the rewriting model, or openai:ADDRESS#NAME; base when absent"
    )
    streams: int = Field(1, ge=1, le=100, description="independent attempts at each behaviour")
    max_tokens: int = Field(200, ge=1, description="length of what it writes at a time")
    temperature: float = Field(1.0, ge=0, description="its sampling temperature")
    top_p: float = Field(0.9, gt=0, le=1, description="its nucleus mass")
    instruction: str | None = Field(None, description="its request; `slots` of the attack's class are filled in")

    @field_validator("instruction")
    @classmethod
    def _has_a_goal(cls, instruction: str | None) -> str | None:
        if instruction is not None and "{goal}" not in instruction:
            raise ValueError("write {goal} where the behaviour belongs")
        return instruction


RewritingT = TypeVar("RewritingT", bound=RewritingConfig)


class RewritingAttack(Attack[RewritingT], Generic[RewritingT]):
    """Makes a trial for each stream and behaviour, and lets the attacker write for all trials of a stream at once."""

    needs = frozenset({"attacker"})
    rewrites_prompts = True
    own_instruction: ClassVar[str]

    @abstractmethod
    def first_slots(self, trial: Trial) -> Iterator[Mapping[str, str]]:
        """Yields fillings of the instruction in the first round; `request` takes the first that fits."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        attacker = target.attacker(self.config.attacker)
        settings = {
            **self.config.model_dump(mode="json", exclude={"streams", "attacker"}),
            "attacker": attacker.attacker_id,
            "judge": target.judge.name,
            "max_lengths": [target.max_length, attacker.max_length],  # which leave out wordings, and what is read
        }
        plain = plain_trials(target, self.name, self.name, prompts, target.max_tokens)
        for trial in plain:
            self.request(attacker, self.first_slots(trial))  # refused here where it does not fit
        return [
            replace(trial, seed=stream, settings=settings, position=position)
            for stream in range(self.config.streams)
            for position, trial in enumerate(plain)
        ]

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        plain, rewritten = super().cost(trials), self.config.max_tokens * len(trials)
        return replace(plain, tokens=self.best_of * (rewritten + plain.tokens))

    def request(self, attacker: Attacker, slots: Iterator[Mapping[str, str]], *, is_over: bool = False) -> list[int]:
        """Fills in the attacker's instruction: the first of several fillings that fits its context.

        Args:
            is_over: Nobody uses the reply, so an attacker behind an address, who may be paid by the word, is not asked.

        Raises:
            SetupError: None of them does.
        """
        if is_over and attacker.is_remote:
            return []
        for filling in slots:
            ids = attacker.codec.encode_prompt(fill_slots(self.config.instruction or self.own_instruction, filling))
            if len(ids) + self.config.max_tokens <= attacker.max_length:
                return ids
        raise SetupError(
            f"The instruction of the attack {self.name} has {len(ids)} tokens and the attacker reads "
            f"{attacker.max_length}, of which {self.config.max_tokens} are for its reply.",
            "Shorten the instruction, lower max_tokens, or use an attacker with a longer context.",
        )

    def written(self, attacker: Attacker, trials: Sequence[Trial], requests: list[list[int]], number: int) -> list[str]:
        """Returns what the attacker writes for each trial in round `number`.

        All trials of a stream are written for in every round, those that are over too: a call without them would give
        the others other seeds. Empty requests get no reply.
        """
        waiting, written = iter(requests), []
        for run in runs(trials):
            written += attacker.generator.generate(
                list(islice(waiting, len(run))),
                max_tokens=self.config.max_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=round_seed(run[0], number) + run[0].position,
            )
        return [attacker.codec.decode(tokens).strip() for tokens in written]


def round_seed(trial: Trial, number: int) -> int:
    """Seed of position 0 in a round of the attacker; other rounds and streams share none of their seeds."""
    return int(content_hash([trial.draw_seed, "round", number])[:9], 16) * 2**20
