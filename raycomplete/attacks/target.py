"""The model under attack, and the tools that an attack may use besides asking it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from raycomplete.attacks.trial import FILTERED, Decoding, EvaluationCancelled, Response, Trial, Verdict
from raycomplete.runtime.errors import DataError, SetupError
from raycomplete.runtime.types import Codec, Generator, Judge, Outcome, Prompt

if TYPE_CHECKING:
    import numpy as np

    from raycomplete.attacks.finetune import FinetuneConfig

Need = Literal["white_boxes", "guide", "attacker", "fine_tune", "helper"]  # each a field of `AttackTools`
FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Triple = tuple[Prompt, str, str]  # prompt, the attacker's part of the answer, and what the model added

ToolT = TypeVar("ToolT")


@dataclass(frozen=True, slots=True)
class SuffixProblem:
    """A prompt with a hole in it and the words that should follow, as token ids."""

    before: tuple[int, ...]  # up to the suffix: template and behaviour
    after: tuple[int, ...]  # between the suffix and the response: the rest of the template
    target: tuple[int, ...]  # the start of the response that is to be made likely


class WhiteBox(Protocol):
    """A model with gradients and full distributions. Implemented by `raycomplete.attacks.white_box.TorchModel`."""

    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        """(token, log-probability) of the `top` likeliest next tokens of each sequence, best first."""

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each asked token as the next one of its sequence."""

    def suffix_gradient(self, problem: SuffixProblem, suffix: Sequence[int]) -> FloatArray:
        """Gradient of the mean loss of the target with respect to one-hot suffix tokens, [suffix tokens, V]."""

    def suffix_losses(self, problem: SuffixProblem, suffixes: Sequence[Sequence[int]], batch: int = 64) -> list[float]:
        """Mean loss of the target (nats a token) under each suffix, `batch` at a time; all are equally long."""

    def suffix_embeddings(self, suffix: Sequence[int]) -> FloatArray:
        """Embeddings of a suffix as the model reads them, [suffix tokens, H]."""

    def descend(
        self, problem: SuffixProblem, suffix_SH: FloatArray, steps: int, lr: float
    ) -> tuple[FloatArray, list[float]]:
        """The suffix after steps along the signed gradient of the target's mean loss, and the loss before each step.

        `lr` is the step of a coordinate over the root mean square of the embedding's entries.
        """

    def continue_embeddings(
        self, problem: SuffixProblem, suffixes: Sequence[FloatArray], max_tokens: int, eos_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuation of the prompt under each suffix of embeddings, end-of-response left out."""


class PrefillHelper(Protocol):
    """Says which answers are still what the attacker wants. `raycomplete.attacks.white_box.TokenClassifier` is one."""

    def accepts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Tells for each prompt and beginning of an answer whether the answer should go on like this."""


class BatchJudge(ABC):
    """A judge that would rather see many responses at once, such as a model.

    Places are those among the responses of the last call of `outcomes`.
    """

    unreadable: frozenset[int] = frozenset()  # places whose verdict could not be read, so that another judge decided
    shortened: frozenset[int] = frozenset()  # places whose end the judge did not read in its short context

    @abstractmethod
    def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
        """Returns one outcome for each triple, in order."""

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        """Sorts one response."""
        return self.outcomes([(prompt, prefill, continuation)])[0]


def judge_all(judge: Judge, triples: Sequence[Triple]) -> list[Outcome]:
    """Sorts responses into outcomes, in batches where the judge can."""
    if isinstance(judge, BatchJudge):
        return judge.outcomes(triples)
    return [judge.outcome(*triple) for triple in triples]


@dataclass(frozen=True)
class Attacker:
    """A model that rewrites prompts."""

    attacker_id: str  # names all that its words depend on besides the request
    generator: Generator
    codec: Any  # has `encode_prompt` and `decode`, as each of our codecs
    max_length: int  # longest sequence that it reads, new tokens included
    is_remote: bool = False  # behind an address, where an empty request is not sent


@dataclass(frozen=True)
class AttackTools:
    """Starters of what some attacks use besides the generator; None where there is no such tool."""

    white_boxes: Callable[[], Sequence[WhiteBox]] | None = None  # copies of the target, at least one
    guide: Callable[[], WhiteBox] | None = None  # the model by which tokens are picked (base)
    guide_id: str = ""  # fingerprint of its weights
    attacker: Callable[[str | None], Attacker] | None = None  # by checkpoint; None stands for base
    fine_tune: Callable[[FinetuneConfig, str], Generator] | None = None  # trains a copy of the target on a dataset
    # Names all that the training depends on besides the target and the settings.
    fine_tune_id: Callable[[FinetuneConfig, str], str] = lambda settings, dataset: ""
    helper: Callable[[str], PrefillHelper] | None = None  # by checkpoint
    helper_id: Callable[[str], str] = lambda checkpoint: ""  # fingerprint of its weights
    refuses: Callable[[str], bool] = lambda text: False  # whether a text declines, by patterns
    # The template and the system prompt that the chats were trained in.
    fine_tune_frame: Callable[[FinetuneConfig, str], tuple[str, str | None]] = lambda settings, dataset: (
        settings.template if dataset == "identity_shift" else "{prompt}",
        None,
    )


@dataclass(frozen=True)
class Target:
    """The model under attack, and who judges its responses."""

    role: str
    model_id: str  # names all that a response depends on besides the trial
    generator: Generator
    codec: Codec
    judge: Judge  # attacks with feedback ask it too
    max_length: int  # longest sequence in tokens, new ones included
    max_tokens: int  # new tokens of a response to a harmful prompt
    tools: AttackTools = field(default_factory=AttackTools)
    cancelled: Callable[[], bool] = lambda: False  # tells whether someone asked to stop
    max_thinking_tokens: int = 0  # of a reasoning model before its answer, where a sequence leaves room for it
    known: dict[Triple, Verdict] = field(default_factory=dict, repr=False, compare=False)  # until they are stored

    def stop_if_cancelled(self) -> None:
        if self.cancelled():
            raise EvaluationCancelled

    def white_boxes(self) -> Sequence[WhiteBox]:
        return _declared(self.tools.white_boxes, "white_boxes")()

    def guide(self) -> WhiteBox:
        return _declared(self.tools.guide, "guide")()

    def helper(self, checkpoint: str) -> PrefillHelper:
        return _declared(self.tools.helper, "helper")(checkpoint)

    def attacker(self, checkpoint: str | None) -> Attacker:
        return _declared(self.tools.attacker, "attacker")(checkpoint)

    def fine_tuned(self, settings: FinetuneConfig, dataset: str) -> Target:
        """A copy of the target that was trained on a dataset."""
        return replace(self, generator=_declared(self.tools.fine_tune, "fine_tune")(settings, dataset))

    @property
    def answering(self) -> Codec:
        """Codec with thinking disabled, for attacks that write the start of the answer themselves."""
        return self.codec.with_thinking(False)

    def room(self, max_tokens: int, sequence: Sequence[int] = ()) -> int:
        """Returns the longest prompt that leaves room for so many tokens of an answer, and for thinking before it."""
        frame = self.codec.frame
        thinks = frame is not None and (frame.may_think(sequence) if sequence else frame.thinks)
        return self.max_length - max_tokens - thinks * (self.max_thinking_tokens + len(frame.closing if frame else ()))

    def response(self, sequence: Sequence[int], prefill: Sequence[int], tokens: Sequence[int]) -> Response:
        """Makes a response of what the model added to a sequence: its thinking is kept apart from its answer."""
        frame = self.codec.frame
        thinking, answer = ((), tuple(tokens)) if frame is None else frame.split(sequence, tokens)
        ended = getattr(tokens, "ended", None)
        return Response(tuple(sequence), tuple(prefill), answer, thinking=thinking, ended=ended)

    def draw(self, sequences: Sequence[Sequence[int]], decoding: Decoding, seed: int | None) -> list[list[int]]:
        """Continues sequences; sequence i is drawn under seed + i."""
        self.stop_if_cancelled()
        return self.generator.generate(
            sequences,
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            seed=seed if decoding.temperature > 0 else None,
        )

    def judged(self, pairs: Sequence[tuple[Trial, Response]]) -> list[Verdict]:
        """Judges the responses of trials, the same words once while they are `known`: a judge may change its mind.

        What a server filtered is refused, and no judge is asked.
        """
        triples = [(trial.prompt, *response.texts(self.codec)) for trial, response in pairs]
        is_filtered = [response.ended == FILTERED and not response.tokens for _, response in pairs]
        asked = [triple for triple, filtered in zip(triples, is_filtered, strict=True) if not filtered]
        if new := [triple for triple in dict.fromkeys(asked) if triple not in self.known]:
            outcomes = judge_all(self.judge, new)
            unreadable, shortened = (getattr(self.judge, name, ()) for name in ("unreadable", "shortened"))
            for place, (triple, outcome) in enumerate(zip(new, outcomes, strict=True)):
                self.known[triple] = Verdict(outcome, place in unreadable, place in shortened)
        return [
            Verdict(Outcome.REFUSED) if filtered else self.known[triple]
            for triple, filtered in zip(triples, is_filtered, strict=True)
        ]

    def check_fits(self, trials: Sequence[Trial]) -> None:
        """Refuses trials that an engine would cut or end early without a word: other rates under the same name."""
        for trial in trials:
            old, room = len(trial.sequence), self.room(trial.decoding.max_tokens, trial.sequence)
            if old > room:
                new = self.max_length - room
                raise DataError(
                    f"The prompt {trial.prompt.prompt_id!r} needs {old + new} tokens in {trial.variant} ({old} of "
                    f"prompt and prefill, {new} new), but the context holds {self.max_length}.",
                    "Shorten or drop the prompt, lower evaluation.max_tokens, evaluation.max_utility_tokens, "
                    "evaluation.max_thinking_tokens or evaluation.depths, or raise models.max_length.",
                )


def _declared(tool: ToolT | None, need: Need) -> ToolT:
    if tool is None:
        raise SetupError(
            f"An attack uses {need} and does not name it in its `needs`.",
            f"Add {need!r} to the `needs` of the attack's class: devices are reserved by them.",
        )
    return tool
