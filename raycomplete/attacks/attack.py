"""The base classes of an attack and of its settings, and the functions that attacks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import model_validator

from raycomplete.attacks.target import Need, Target
from raycomplete.attacks.trial import Decoding, Emit, Response, Trial, TrialCost
from raycomplete.runtime.errors import DataError, SetupError, WorkError
from raycomplete.runtime.section import Section
from raycomplete.runtime.types import Codec, Prompt

STANDARD_BEHAVIOURS = 100  # as many as JailbreakBench has
STANDARD_ANSWER_TOKENS = 256  # enough to see a model refuse first and comply then
MAX_STEPS = 5000  # upper bounds keep a request from asking for years of work
_NEEDS: Mapping[Need, str] = {
    "white_boxes": "the weights of the model",
    "guide": "base's distributions to pick tokens by",
    "attacker": "a model that rewrites prompts",
    "fine_tune": "a trainer",
    "helper": "a classifier that accepts tokens",
}


class AttackConfig(Section):
    """Settings of an attack. Defaults are those of published runs; a rate under smaller ones is called reduced."""

    # Least values of published runs. A list must hold all items of a list, and as many items as a number says.
    standard: ClassVar[Mapping[str, Any]] = {}

    name: str

    @model_validator(mode="after")
    def _names_nothing_twice(self) -> AttackConfig:
        """Items of lists are variants: one that is named twice would be asked and counted twice."""
        for field, value in self:
            if isinstance(value, list) and (twice := [item for n, item in enumerate(value) if item in value[:n]]):
                raise ValueError(f"{field} names {twice[0]} twice")
        return self

    def answer_depths(self) -> list[int]:
        """Numbers of tokens that the attack takes from a prompt's answer, by variant; openings do not count."""
        return []

    def constants(self, *names: str) -> dict[str, Any]:
        """Constants of the class that decide responses, for the settings of trials."""
        return {name: getattr(self, name) for name in names}

    def reduced_because(self, num_behaviours: int) -> list[str]:
        """Lists how these settings fall short of published runs."""
        reasons = []
        for field, least in self.standard.items():
            value = getattr(self, field)
            if isinstance(least, list):
                if missing := [item for item in least if item not in value]:
                    reasons.append(f"{field} without {', '.join(map(str, missing))}")
            elif isinstance(value, list):
                reasons += [f"{len(value)} {field} instead of {least}"] if len(value) < least else []
            elif value < least:
                reasons.append(f"{field} {value} instead of {least}")
        if num_behaviours < STANDARD_BEHAVIOURS:
            reasons.append(f"{num_behaviours} behaviours instead of {STANDARD_BEHAVIOURS}")
        return reasons


ConfigT = TypeVar("ConfigT", bound=AttackConfig)


class Attack(ABC, Generic[ConfigT]):
    """One attack with its settings.

    `plan` lists the trials and refuses what cannot be asked; it generates nothing. `run` gets the responses of those
    trials that are not on disk yet and emits them as they come. A trial that `is_short`, or whose `settings` name a
    `depth` that its prefill does not reach, is left out of the evaluation and counted: its name promises more.
    """

    config_class: ClassVar[type[AttackConfig]]  # set by `registry.register`
    needs: frozenset[Need] = frozenset()  # devices are reserved by it, and other tools are withheld
    rewrites_prompts: ClassVar[bool] = False  # a rewritten prompt may lose the behaviour
    asks_harmlessly: ClassVar[bool] = False  # a judge may have `tells_harmless = False` and is refused then
    with_prefill: ClassVar[bool] = False  # answers are judged a second time, with the prefill as part of them
    prompt_has_answer: ClassVar[bool] = False  # its tokens may hold words of an answer, which exports hide
    rate_is_worst: ClassVar[bool] = False  # the rate is that of the best of a behaviour's answers

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """The name in the run file and in results."""
        return self.config.name

    @property
    def best_of(self) -> int:
        """Number of responses from which the judge picks that of one trial: its errors add up in what it picks."""
        return 1

    @property
    def headline(self) -> str | None:
        """The variant whose rates are those of the attack; None where all variants count together."""
        return None

    @property
    def checkpoints(self) -> dict[str, str]:
        """Checkpoints of the models that the attack brings along, by the setting that names them."""
        named = {need: getattr(self.config, need, None) for need in ("attacker", "helper") if need in self.needs}
        return {setting: checkpoint for setting, checkpoint in named.items() if checkpoint is not None}

    def answer_tokens(self, trial: Trial) -> int:
        """Returns the largest number of new tokens of a response to the trial."""
        return trial.decoding.max_tokens

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        """Returns what the trials take at most."""
        return TrialCost(len(trials), sum(map(self.answer_tokens, trials)))

    def is_cut(self, trial: Trial, response: Response) -> bool:
        """Tells whether the response was cut by its length."""
        return response.is_cut(self.answer_tokens(trial))

    def reduced_because(self, codec: Codec, prompts: Sequence[Prompt]) -> list[str]:
        """Lists how the settings fall short of published runs on these behaviours."""
        return self.config.reduced_because(len(prompts))

    def prepared(self, target: Target) -> Target:
        """Returns the target with the tools that `needs` names, and no others.

        Raises:
            SetupError: One of them is not there, or the judge is too blind for the attack.
        """
        if self.asks_harmlessly and not getattr(target.judge, "tells_harmless", True):
            raise blind_judge(self.name, target.judge.name)
        for need in sorted(self.needs):
            if getattr(target.tools, need) is None:
                raise SetupError(f"The attack {self.name} needs {_NEEDS[need]}.", "Run it by raycomplete evaluate.")
        withheld: dict[str, Any] = dict.fromkeys(_NEEDS.keys() - self.needs)
        return replace(target, tools=replace(target.tools, **withheld))

    @abstractmethod
    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        """Lists every trial of the attack, variant by variant.

        Raises:
            DataError: The behaviours or the user's files cannot be used.
        """

    def trial(
        self,
        target: Target,
        variant: str,
        prompt: Prompt,
        read: Sequence[int],
        given: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Makes a greedy trial: the model reads `read` and, as the start of its answer, `given`."""
        sequence, decoding = (*read, *given), Decoding(target.max_tokens)
        return Trial(self.name, variant, prompt, sequence, decoding, tuple(given), settings=settings or {})

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        """Gets the responses of planned trials; by default, what the model adds to each sequence."""
        ask(target, trials, emit)


def blind_judge(attack: str, judge: str) -> SetupError:
    """Returns the error of an attack whose first, harmless answers the judge would take for success."""
    return SetupError(
        f"The attack {attack} begins with harmless questions, and the judge {judge} takes the answers to them for "
        "success.",
        "Set evaluation.judge.kind to model, endpoint or judgezoo, or leave the attack out.",
    )


def ask(target: Target, trials: Sequence[Trial], emit: Emit) -> None:
    """Lets the model continue the sequence of each trial, and emits the responses group by group."""
    for group in grouped(trials):
        emit(list(zip(group, continued(target, group), strict=True)))


def grouped(trials: Sequence[Trial], *, drawn: bool = False) -> Iterator[list[Trial]]:
    """Splits trials into neighbours of one variant, draw and decoding, and with `drawn` where positions skip.

    An engine draws the n-th sequence of a call under seed + n.
    """

    def key(numbered: tuple[int, Trial]) -> tuple[Any, ...]:
        number, trial = numbered
        return (trial.variant, trial.seed, trial.decoding, drawn and trial.position - number)

    for _, group in groupby(enumerate(trials), key=key):
        yield [trial for _, trial in group]


def continued(target: Target, trials: Sequence[Trial]) -> list[Response]:
    """Continues the sequence of each trial; the trials share their decoding.

    A trial is drawn under the seed of its position in the plan, whichever others are missing.
    """
    tokens: list[list[int]] = []
    is_drawn = any(trial.decoding.temperature > 0 for trial in trials)
    batches = list(grouped(trials, drawn=True)) if is_drawn else [list(trials)]
    for batch in batches if trials else []:
        seed = batch[0].draw_seed + batch[0].position
        tokens += target.draw([trial.sequence for trial in batch], batch[0].decoding, seed)
    if len(tokens) != len(trials):
        raise WorkError(
            f"The generator returned {len(tokens)} continuations for {len(trials)} sequences of {trials[0].variant}.",
            "Finished trials are kept; run the same command again to go on.",
        )
    return [target.response(trial.sequence, trial.prefill, new) for trial, new in zip(trials, tokens, strict=True)]


def plain_trials(target: Target, attack: str, variant: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Trial]:
    """Makes trials of the prompts as they are, without attack."""
    codec, decoding = target.codec, Decoding(max_tokens)
    return [Trial(attack, variant, prompt, tuple(prompt.encoded(codec)), decoding) for prompt in prompts]


def require_answers(prompts: Sequence[Prompt], use: str, remedy: str) -> None:
    """Raises a DataError if none of the behaviours has a compliant answer."""
    if not any(prompt.answer for prompt in prompts):
        raise DataError(
            f"No harmful prompt has an answer, {use}.",
            f"Name the answer column of data.evaluation.harmful, or {remedy}.",
        )


def answer_ids(codec: Codec, prompt: Prompt) -> list[int]:
    """Tokens of the behaviour's compliant answer; none where it is unknown."""
    return codec.encode_answer(prompt.answer) if prompt.answer else []
