"""A trial: one model's response to one behaviour under one variant of an attack, drawn under one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from raycomplete.runtime.errors import StoppedError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.types import Codec, Outcome, Prompt

FORMAT = 3  # part of every key: raise it when the meaning of a stored response changes

_GO_ON = "Finished work is kept; the same command continues it (train: with --resume)."
# Entries of a response's stats that results read.
FIRST_COMPLIED = "first_complied"  # 1 where the first of the responses that a judge picked from complied
CUT_BY_CONTEXT = "cut_by_context"  # 1 where the context left no room for the steps asked for
UNUSED_WORDINGS = "unused_wordings"  # empty or too long for the context, so that others were asked in their place
UNREADABLE = "unreadable_verdicts"  # replies of the judge without a verdict, none of which ended the search
FILTERED = "content_filter"  # how a response `ended` that a server kept back, in its model's place


@dataclass(frozen=True, slots=True)
class Decoding:
    """The way in which a response is drawn. Temperature 0 is greedy; top_k 0 keeps the whole vocabulary."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """A planned question to the model, in token ids."""

    attack: str
    variant: str  # part of the attack under which rates are kept apart, such as `prefill-4`
    prompt: Prompt
    sequence: tuple[int, ...]  # what the model reads, prefill included; for searches, what they start from
    decoding: Decoding
    prefill: tuple[int, ...] = ()  # the attacker's own answer tokens in `sequence`, which the judge is told apart
    seed: int = 0  # number of the draw under the same settings
    settings: Mapping[str, Any] = field(default_factory=dict)  # everything else that decides the response
    position: int = 0  # place among the trials drawn under the same seed; 0 where nothing is drawn
    is_short: bool = False  # the compliant answer does not reach the depth: an evaluation leaves it out and counts it

    def key(self, model_id: str) -> str:
        """Hash of all that decides the response: token ids stand for tokenizer, chat template and the answer."""
        return content_hash(
            {
                "format": FORMAT,
                "model_id": model_id,
                "attack": self.attack,
                "variant": self.variant,
                "prompt": [self.prompt.prompt_id, self.prompt.text, self.prompt.kind, *self.prompt.context],
                "sequence": self.sequence,
                "prefill": self.prefill,
                "decoding": asdict(self.decoding),
                "seed": self.seed,
                "position": self.position,
                "settings": self.settings,
            }
        )

    def judgement_key(self, key: str) -> str:
        """Hash of all that decides the judgement of the response under `key`: judges may read the prompt's answer."""
        return content_hash([key, self.prompt.answer])

    @property
    def draw_seed(self) -> int:
        """Seed of position 0 among the trials drawn with this one; other variants and draws share none of its seeds."""
        return int(content_hash([self.attack, self.variant, self.seed])[:9], 16) * 2**20


class Verdict(NamedTuple):
    """A judge's verdict on a response."""

    outcome: Outcome
    unreadable: bool = False  # the judge's reply held no verdict, and patterns decided
    shortened: bool = False  # the judge did not read its end

    @property
    def sure(self) -> Outcome:
        """The outcome that may end a search: compliance only where the judge's own reply says so."""
        return Outcome.OFF_TOPIC if self.unreadable and self.outcome.is_compliance else self.outcome


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a trial, in token ids."""

    sequence: tuple[int, ...]  # what the model read in the end
    prefill: tuple[int, ...]  # the attacker's own answer tokens in it
    tokens: tuple[int, ...]  # what the model added
    stats: Mapping[str, Any] = field(default_factory=dict)  # numbers of the search, such as its queries and losses
    conversation: Sequence[Mapping[str, Any]] = ()  # what was said before, and in turns that were taken back
    thinking: tuple[int, ...] = ()  # what a reasoning model wrote before `tokens`, which nobody judges
    ended: str | None = None  # the `finish_reason` of a server, whose tokens are not those counted here
    verdict: Verdict | None = None  # on which a search ended, whose trial names the judge; it is not judged again

    def is_cut(self, max_tokens: int) -> bool:
        """Tells whether it was cut at so many tokens."""
        return len(self.tokens) >= max_tokens if self.ended is None else self.ended == "length"

    def texts(self, codec: Codec) -> tuple[str, str]:
        """The attacker's part of the answer and what the model added."""
        return (codec.decode(self.prefill) if self.prefill else "", codec.decode(self.tokens) if self.tokens else "")


class Said(list[int]):
    """New tokens of a response whose server says how it `ended`."""

    def __init__(self, tokens: Sequence[int], ended: str | None) -> None:
        super().__init__(tokens)
        self.ended = ended


@dataclass(frozen=True, slots=True)
class TrialCost:
    """The most that trials take: new tokens, forward passes of white boxes, and gradient steps."""

    trials: int
    tokens: int
    passes: int = 0
    gradients: int = 0


Emit = Callable[[Sequence[tuple[Trial, Response]]], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the evaluation of one model."""

    role: str
    attack: str  # at work; "" before the first trial
    variant: str  # of it, that was finished last
    done: int
    total: int
    reused: int  # trials that an earlier evaluation had finished
    outcomes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Outcome), 0))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class EvaluationCancelled(StoppedError):
    """Someone asked to stop; what was finished is kept."""

    def __init__(self, problem: str = "The evaluation was cancelled.", remedy: str = _GO_ON) -> None:
        super().__init__(problem, remedy)
