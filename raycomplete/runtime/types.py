"""The types that several rooms share: prompts, outcomes, rates, and the protocols of codecs, generators and judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol

PromptKind = Literal["harmful", "benign", "borderline"]
TurnRole = Literal["user", "assistant"]
ModelRole = Literal["base", "aligned", "student"]
MODEL_ROLES: tuple[ModelRole, ...] = ("base", "aligned", "student")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message, and the conversation that it ends where there is one."""

    prompt_id: str
    text: str
    kind: PromptKind
    answer: str | None = None
    source: str = ""
    answer_goes_on: bool = False
    system: str | None = None
    earlier: tuple[tuple[TurnRole, str], ...] = ()

    @property
    def context(self) -> list[tuple[str, str]]:
        """System prompt and earlier turns as (role, text); empty for a plain prompt.

        Hashes of prompts hold it at their end, so that those of plain prompts are what they were without it.
        """
        return [*([("system", self.system)] if self.system else []), *self.earlier]

    @property
    def transcript(self) -> str:
        """The whole conversation as one text, for judges and for telling prompts apart; a plain prompt is its text."""
        return transcript([*self.context, ("user", self.text)]) if self.context else self.text

    def encoded(self, codec: Codec, text: str | None = None, *, system: str | None = None) -> list[int]:
        """Encodes the whole conversation in the chat template, up to the point where the response starts."""
        asked = self.text if text is None else text
        if not self.context:
            return codec.encode_prompt(asked, system) if system else codec.encode_prompt(asked)
        systems = "\n\n".join(item for item in (system, self.system) if item)
        return codec.encode_conversation([*(turn for _, turn in self.earlier), asked], systems or None)

    def encoded_all(self, codec: Codec, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many wordings of the last user turn, each as `encoded` does."""
        return [self.encoded(codec, text) for text in texts] if self.context else codec.encode_prompts(texts)


def transcript(turns: Sequence[tuple[str, str]]) -> str:
    """Writes (role, text) turns one below the other."""
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


class Outcome(StrEnum):
    """The outcome of a prompt: what the model did. Every prompt gets exactly one, so that denominators never shrink."""

    REFUSED = "refused"
    REFUSED_THEN_COMPLIED = "refused_then_complied"  # declined, and helped all the same after it
    COMPLIED = "complied"
    OFF_TOPIC = "off_topic"  # readable and no refusal, but an answer to something else
    INCOHERENT = "incoherent"
    EMPTY = "empty"

    @property
    def is_compliance(self) -> bool:
        """Tells whether the model gave what was asked for: what an attack counts as success."""
        return self in (Outcome.COMPLIED, Outcome.REFUSED_THEN_COMPLIED)


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of n trials with its 95 % interval."""

    rate: float
    n: int
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ResponseFrame:
    """Marks, in token ids, between the thinking of a reasoning model, its answer and its end.

    What a model reads and writes is: prompt, which ends in `turn`; `opening`, thinking, `closing`; answer, end.
    """

    turn: tuple[int, ...]
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    thought_mark: tuple[int, ...]
    answer_mark: tuple[int, ...]
    thinks: bool = False

    def may_think(self, sequence: Sequence[int]) -> bool:
        """Tells whether what is added to a sequence may be thinking: the answer of its last turn has not begun."""
        return _last(self._own_turn(sequence), self.answer_mark) is None

    def split(self, sequence: Sequence[int], tokens: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits what was added to a sequence into thinking, its closing included, and answer; either may be empty.

        The first mark of an answer decides: an answer that writes another one hides nothing from a judge.
        """
        tokens = tuple(tokens)
        if not self.may_think(sequence):
            return (), tokens
        place = next(_places(tokens, self.answer_mark), None)
        if place is None:
            is_open = _last(self._own_turn((*sequence, *tokens)), self.thought_mark) is not None
            return (tokens, ()) if is_open else ((), tokens)
        rest = self.closing[(_last(self.closing, self.answer_mark) or 0) + len(self.answer_mark) :]
        end = place + len(self.answer_mark)
        end += len(rest) if tokens[end : end + len(rest)] == rest else 0
        return tokens[:end], tokens[end:]

    def _own_turn(self, sequence: Sequence[int]) -> tuple[int, ...]:
        start = _last(sequence, self.turn) if self.turn else None
        return tuple(sequence[0 if start is None else start + len(self.turn) :])


def _last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Returns where a run of tokens starts for the last time."""
    return max(_places(tokens, wanted), default=None)


def _places(tokens: Sequence[int], wanted: Sequence[int]) -> Iterator[int]:
    size = len(wanted)
    starts = range(len(tokens) - size + 1)
    return (start for start in starts if tuple(tokens[start : start + size]) == tuple(wanted))


class Codec(Protocol):
    """Turns text into token ids and back, chat template included; `raycomplete.data.chat.ChatCodec` is one."""

    @property
    def frame(self) -> ResponseFrame | None:
        """Marks of thinking and answer; None where the template has no place for thinking."""

    def with_thinking(self, thinks: bool) -> Codec:
        """Returns the codec whose prompts end before the thinking, or after an empty one: where the answer starts."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a response."""

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Encodes a user message in its chat template, up to the point where the response starts."""

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many user messages at once, each as `encode_prompt` does."""

    def encode_conversation(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """Encodes turns of user and model by turns, the user's first and last, up to where the response starts."""

    def encode_answer(self, text: str) -> list[int]:
        """Encodes response tokens, without template and without end-of-response."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes response tokens; special tokens are left out."""

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decodes many sequences at once, each as `decode` does."""


class Generator(Protocol):
    """A model that continues token sequences; `raycomplete.engines.rollout_pool.RolloutPool` is one."""

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continues sequences of prompt and prefill; returns the new token ids, end-of-response left out.

        Temperature 0 is greedy, top_k 0 samples from all tokens, and sequence i samples under seed + i.
        """


class Judge(Protocol):
    """Sorts a response into one outcome.

    A judge of training may also have `refusal_start(continuation: str) -> int | None`: the character at which the
    refusal begins, None where it finds no beginning. What stands before is then never taken for the refusal. One with
    `right_is_compliance = True` is not asked for `is_right`: a response is right where its outcome is compliance.
    """

    @property
    def name(self) -> str:
        """The name that is recorded beside every rate that the judge made."""

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        """Says what the model did with a prompt, whose response is the attacker's prefill and its continuation."""

    def is_right(self, prompt: Prompt, continuation: str) -> bool:
        """Tells whether a response to a harmless prompt is useful: right where an answer is known, else an attempt."""
