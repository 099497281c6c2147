"""What every attack is: a plan of trials, and a way to get their responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar, Generic, TypeVar

from raycomplete.attacks.settings import AttackConfig
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Emit, Response, Trial
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.types import Codec, Prompt

ConfigT = TypeVar("ConfigT", bound=AttackConfig)


class Attack(ABC, Generic[ConfigT]):
    """One attack with its settings.

    `plan` says what will be asked and refuses what cannot be; it starts nothing. `run` gets the responses of trials of
    that plan, those that are not on the disk yet, and hands them out as soon as they are there.

    Attributes:
        rewrites_prompts: What the model is asked may lose the behaviour, which only a judge that reads it notices.
    """

    rewrites_prompts: ClassVar[bool] = False

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def best_of(self) -> int:
        """Among how many responses the judge picks that of one trial: its errors add up in what it picks itself."""
        return 1

    @abstractmethod
    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        """Every trial of the attack, variant by variant.

        Raises:
            DataError: The behaviours or the user's files cannot be used.
            SetupError: The attack needs a tool that is not there.
        """

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        """Responses of planned trials: here, what the model adds to each sequence."""
        for group in grouped(trials):
            emit(list(zip(group, continued(target, group), strict=True)))


def grouped(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Neighbours of one variant, draw and decoding: what is emitted together."""
    for _, group in groupby(trials, key=lambda trial: (trial.variant, trial.seed, trial.decoding)):
        yield list(group)


def runs(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Neighbours whose positions follow each other: an engine draws the n-th sequence of a call under seed + n."""
    for _, group in groupby(enumerate(trials), key=lambda pair: pair[1].position - pair[0]):
        yield [trial for _, trial in group]


def continued(target: Target, trials: Sequence[Trial]) -> list[Response]:
    """What the model adds to the sequence of each trial; the trials share their decoding.

    A trial is drawn under the seed of its position in the plan, whatever else is missing.
    """
    if not trials:
        return []
    tokens: list[list[int]] = []
    for batch in runs(trials) if trials[0].decoding.temperature > 0 else [trials]:
        seed = trials[0].draw_seed + batch[0].position
        tokens += target.draw([trial.sequence for trial in batch], trials[0].decoding, seed)
    if len(tokens) != len(trials):
        raise WorkError(
            f"The generator returned {len(tokens)} continuations for {len(trials)} sequences of {trials[0].variant}.",
            "Finished trials are kept; run the same command again to go on.",
        )
    return [Response(trial.sequence, trial.prefill, tuple(new)) for trial, new in zip(trials, tokens, strict=True)]


def plain_trials(target: Target, attack: str, variant: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Trial]:
    """The prompts as they are, without attack."""
    decoding = Decoding(max_tokens)
    return [
        Trial(attack, variant, prompt, tuple(target.codec.encode_prompt(prompt.text)), decoding) for prompt in prompts
    ]


def answer_ids(codec: Codec, prompt: Prompt) -> list[int]:
    """Tokens of the behaviour's compliant answer; none where it is unknown."""
    return codec.encode_answer(prompt.answer) if prompt.answer else []
