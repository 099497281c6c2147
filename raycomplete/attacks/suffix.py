"""Base of suffix searches: where the suffix stands, which tokens may be used, and how the result is measured."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from pydantic import Field

from raycomplete.attacks.attack import Attack, AttackConfig, continued
from raycomplete.attacks.target import SuffixProblem, Target, WhiteBox
from raycomplete.attacks.trial import Decoding, Emit, Trial
from raycomplete.data.openings import num_common
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.types import Codec, Prompt

if TYPE_CHECKING:
    import numpy as np

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


class SuffixConfig(AttackConfig):
    """Settings of the suffix searches. The target is the opening of a compliant answer."""

    standard: ClassVar[Mapping[str, Any]] = {"suffix_tokens": 20, "target_tokens": 20}

    suffix_tokens: int = Field(20, ge=1, description="length of the suffix")
    filler: str = Field("!", description="the suffix at the start, repeated")
    target: str | None = Field(None, description="words to force; the first sentence of the answer when absent")
    target_tokens: int = Field(20, ge=1, description="tokens of the target, at most")


SuffixT = TypeVar("SuffixT", bound=SuffixConfig)
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


@dataclass
class Search:
    """A search for the suffix of one behaviour."""

    problem: SuffixProblem
    codec: Codec
    prompt: Prompt  # the behaviour
    best: tuple[int, ...]  # the suffix with the least loss so far
    losses: list[float] = field(default_factory=list)  # of the suffix after each step, that of the filler first
    queries: int = 0  # suffixes that the model was asked about
    best_loss: float = float("inf")
    drawn: int = 0  # candidates that were checked for coming back from text
    survivors: int = 0  # candidates that did

    @property
    def sequence(self) -> tuple[int, ...]:
        """The prompt with the best suffix."""
        return (*self.problem.before, *self.best, *self.problem.after)

    def note(self, suffix: Sequence[int], loss: float) -> None:
        """Records the suffix of a step."""
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best, self.best_loss = tuple(suffix), loss

    def surviving(self, suffixes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Returns the suffixes that come back as the same tokens when they are typed as text, as an attacker must."""
        texts = [f"{self.prompt.text} {text.strip()}" for text in self.codec.decode_all(suffixes)]
        typed = self.prompt.encoded_all(self.codec, texts)
        before, after = self.problem.before, self.problem.after
        kept = [ids for ids, back in zip(suffixes, typed, strict=True) if tuple(back) == (*before, *ids, *after)]
        self.drawn += len(suffixes)
        self.survivors += len(kept)
        return kept


class SuffixAttack(Attack[SuffixT], Generic[SuffixT]):
    """Knows where the suffix of a behaviour stands and what it should force."""

    needs = frozenset({"white_boxes"})

    def reduced_because(self, codec: Codec, prompts: Sequence[Prompt]) -> list[str]:
        """Adds where the end of the user's target is left out."""
        words, most = len(codec.encode_answer(self.config.target or "")), self.config.target_tokens
        cut = [f"target cut at {most} of its {words} tokens"] if words > most else []
        return super().reduced_because(codec, prompts) + cut

    def start(self, codec: Codec, prompt: Prompt) -> Search:
        """Returns the search before its first step."""
        config = self.config
        filler = " ".join([config.filler] * config.suffix_tokens)
        without, with_filler = prompt.encoded(codec), prompt.encoded(codec, f"{prompt.text} {filler}")
        num_before = num_common(without, with_filler)
        num_after = num_common(without[num_before:][::-1], with_filler[::-1])
        end = len(with_filler) - num_after
        if end <= num_before:
            raise DataError(f"The filler {config.filler!r} adds no tokens to the prompt {prompt.prompt_id!r}.")
        forced = codec.encode_answer(first_sentence(prompt.answer or "") if config.target is None else config.target)
        if config.target is None and not forced:
            raise DataError(
                f"The prompt {prompt.prompt_id!r} has no answer whose opening {self.name} could force.",
                f"Name the answer column of data.evaluation.harmful, or give {self.name} a target.",
            )
        before, after = tuple(with_filler[:num_before]), tuple(with_filler[end:])
        problem = SuffixProblem(before, after, tuple(forced[: config.target_tokens]))
        return Search(problem, codec, prompt, tuple(with_filler[num_before:end]))


class SuffixSearch(SuffixAttack[SuffixT], Generic[SuffixT]):
    """Finds a suffix for each behaviour on a white box, one search at a time on each, then asks the model greedily."""

    without_effect: ClassVar[tuple[str, ...]] = ()  # settings that decide memory and speed alone

    @abstractmethod
    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        """Improves `found.best` with usable tokens until the budget is spent."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        shared = self.config.model_dump(mode="json", exclude=set(self.without_effect))
        trials = []
        for prompt in prompts:
            found = self.start(target.answering, prompt)
            settings = {**shared, "target_ids": found.problem.target}
            decoding = Decoding(target.max_tokens)
            trials.append(Trial(self.name, self.name, prompt, found.sequence, decoding, settings=settings))
        return trials

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        usable = usable_tokens(target.codec, target.white_boxes()[0].vocab_size())

        def search(target: Target, box: WhiteBox, trial: Trial) -> Search:
            return self._search(target, box, trial, usable)

        for trial, found in side_by_side(target, trials, search):
            (response,) = continued(target, [replace(trial, sequence=found.sequence)])
            stats = {
                "queries": found.queries,
                "steps": len(found.losses) - 1,
                "survivor_rate": round(found.survivors / found.drawn, 4) if found.drawn else 1.0,
                "loss_start": round(found.losses[0], 4),
                "loss_best": round(found.best_loss, 4),
            }
            emit([(trial, replace(response, stats=stats))])

    def _search(self, target: Target, box: WhiteBox, trial: Trial, usable: IntArray) -> Search:
        import numpy as np

        found = self.start(target.answering, trial.prompt)
        found.note(found.best, box.suffix_losses(found.problem, [found.best])[0])
        self.search(target, box, found, usable, np.random.default_rng(int(trial.key(target.model_id), 16)))
        if found.drawn and not found.survivors:
            raise WorkError(
                f"None of the {found.drawn} suffixes that {self.name} tried on the prompt {trial.prompt.prompt_id!r} "
                "comes back as the same tokens when it is typed as text, so nothing was searched.",
                f"Give {self.name} another filler or more steps, or leave it out for this tokenizer.",
            )
        return found


def side_by_side(
    target: Target, tasks: Sequence[TaskT], work: Callable[[Target, WhiteBox, TaskT], ResultT]
) -> Iterator[tuple[TaskT, ResultT]]:
    """Works on as many white boxes as there are side by side, and yields what is finished."""
    waiting, free = list(reversed(tasks)), list(target.white_boxes())
    running: dict[Future[ResultT], tuple[TaskT, WhiteBox]] = {}
    failed = Event()
    stoppable = replace(target, cancelled=lambda: failed.is_set() or target.cancelled())
    with ThreadPoolExecutor(max_workers=len(free)) as pool:
        try:
            while waiting or running:
                while waiting and free:
                    task, box = waiting.pop(), free.pop()
                    running[pool.submit(work, stoppable, box, task)] = (task, box)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, box = running.pop(future)
                    free.append(box)
                    yield task, future.result()
        finally:
            failed.set()  # the pool waits for its threads, and a search may take hours


def first_sentence(text: str) -> str:
    """Returns the first sentence of an answer: up to its end of line, or to a full stop that no digit precedes.

    Suffixes are searched for the opening of an answer, as in the GCG paper; what follows it, such as the number of a
    first step, makes the loss harder to lower and the model no more willing.
    """
    found = re.match(r"\s*\S.*?(?:(?<!\d)[.!?][\"')\]]*(?=\s|$)|(?=\n)|$)", text)
    return found.group() if found else ""


def usable_tokens(codec: Codec, num_tokens: int) -> IntArray:
    """Lists the tokens that a suffix may hold: printable ASCII, as in the GCG paper; no special tokens."""
    import numpy as np

    texts = (codec.decode([token]) for token in range(num_tokens))
    usable = [token for token, text in enumerate(texts) if text.strip() and text.isascii() and text.isprintable()]
    return np.asarray(usable, dtype=np.int64)


def losses_of(box: WhiteBox, found: Search, candidates: Sequence[Sequence[int]], batch: int) -> list[float]:
    """Computes the loss of each candidate, in forward passes of at most `batch`."""
    found.queries += len(candidates)
    return box.suffix_losses(found.problem, candidates, batch)
