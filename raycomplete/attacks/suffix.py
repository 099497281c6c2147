"""Suffix searches on a white box: by gradient (GCG), by chance, and in the space of embeddings (soft prompt).

GCG (Zou et al., arXiv 2307.15043, algorithm 1, one behaviour at a time): each step, the gradient of the target's loss
with respect to the one-hot tokens of the suffix gives every position its `top` most promising substitutes;
`search_width` candidates each change one token, positions in even turns; the best of them becomes the suffix, even if
it is worse than the one before. Departures from the paper: candidates that would not survive being typed as text are
dropped, and the best suffix of all steps is used in the end.

Soft prompt (Schwinn et al., arXiv 2402.09063): the signed gradient of the target's loss moves every coordinate of the
suffix's embeddings by one step. No text has such embeddings, so this is a bound on what any suffix can do, against an
attacker who holds the weights. As its authors do, the attack asks the model after every few steps: the loss of the
target goes on falling after the answers have become worse.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise
from math import ceil
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field

from raycomplete.attacks.attack import MAX_STEPS, Attack, AttackConfig, continued
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import FloatArray, SuffixProblem, Target, WhiteBox
from raycomplete.attacks.trial import Emit, Response, Trial, TrialCost
from raycomplete.data.openings import num_common
from raycomplete.runtime.errors import DataError, WorkError
from raycomplete.runtime.types import Codec, Prompt

if TYPE_CHECKING:
    import numpy as np  # at work imported by functions: settings must be readable where numpy is broken

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
_BATCH = 64  # candidates of one forward pass; the white box halves it where memory is short


class SuffixConfig(AttackConfig):
    """Suffix searches, whose target is the opening of a compliant answer."""

    standard: ClassVar[Mapping[str, Any]] = {"suffix_tokens": 20}
    filler: ClassVar[str] = "!"  # the suffix at the start, repeated
    target: ClassVar[str | None] = None  # words to force; None: the first sentence of the answer
    target_tokens: ClassVar[int] = 20  # tokens of the target, at most

    suffix_tokens: int = Field(20, ge=1, description="length of the suffix")

    def decisive(self) -> dict[str, Any]:
        """Settings and constants that decide a response."""
        return self.model_dump(mode="json") | self.constants("filler", "target", "target_tokens")


SuffixT = TypeVar("SuffixT", bound=SuffixConfig)


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

    def ask(self, box: WhiteBox, candidates: Sequence[Sequence[int]], batch: int) -> list[float]:
        """Returns the loss of each candidate, in forward passes of at most `batch`."""
        self.queries += len(candidates)
        return box.suffix_losses(self.problem, candidates, batch)

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
                f"Name the answer column of data.evaluation.harmful, or leave {self.name} out.",
            )
        before, after = tuple(with_filler[:num_before]), tuple(with_filler[end:])
        problem = SuffixProblem(before, after, tuple(forced[: config.target_tokens]))
        return Search(problem, codec, prompt, tuple(with_filler[num_before:end]))


class SuffixSearch(SuffixAttack[SuffixT], Generic[SuffixT]):
    """Finds a suffix for each behaviour on a white box, one search at a time on each, then asks the model greedily."""

    @abstractmethod
    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        """Improves `found.best` with usable tokens until the budget is spent."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        trials = []
        for prompt in prompts:
            found = self.start(target.answering, prompt)
            settings = self.config.decisive() | {"target_ids": found.problem.target}
            trials.append(self.trial(target, self.name, prompt, found.sequence, settings=settings))
        return trials

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        usable = usable_tokens(target.codec, target.white_boxes()[0].vocab_size())
        for trial, found in side_by_side(target, trials, partial(self._search, usable)):
            (response,) = continued(target, [replace(trial, sequence=found.sequence)])
            stats = {
                "queries": found.queries,
                "steps": len(found.losses) - 1,
                "survivor_rate": round(found.survivors / found.drawn, 4) if found.drawn else 1.0,
                "loss_start": round(found.losses[0], 4),
                "loss_best": round(found.best_loss, 4),
            }
            emit([(trial, replace(response, stats=stats))])

    def _search(self, usable: IntArray, target: Target, box: WhiteBox, trial: Trial) -> Search:
        import numpy as np

        found = self.start(target.answering, trial.prompt)
        found.note(found.best, box.suffix_losses(found.problem, [found.best])[0])
        self.search(target, box, found, usable, np.random.default_rng(int(trial.key(target.model_id), 16)))
        if found.drawn and not found.survivors:
            raise WorkError(
                f"None of the {found.drawn} suffixes that {self.name} tried on the prompt {trial.prompt.prompt_id!r} "
                "comes back as the same tokens when it is typed as text, so nothing was searched.",
                f"Give {self.name} more steps, or leave it out for this tokenizer.",
            )
        return found


def side_by_side(
    target: Target, tasks: Sequence[TaskT], work: Callable[[Target, WhiteBox, TaskT], ResultT]
) -> Iterator[tuple[TaskT, ResultT]]:
    """Works on all white boxes side by side, and yields what is finished."""
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

    What follows it makes the loss harder to lower and the model no more willing.
    """
    found = re.match(r"\s*\S.*?(?:(?<!\d)[.!?][\"')\]]*(?=\s|$)|(?=\n)|$)", text)
    return found.group() if found else ""


def usable_tokens(codec: Codec, num_tokens: int) -> IntArray:
    """Lists the tokens that a suffix may hold: printable ASCII, as in the GCG paper; no special tokens."""
    import numpy as np

    texts = (codec.decode([token]) for token in range(num_tokens))
    usable = [token for token, text in enumerate(texts) if text.strip() and text.isascii() and text.isprintable()]
    return np.asarray(usable, dtype=np.int64)


class GcgConfig(SuffixConfig):
    """Greedy coordinate gradient (Zou et al., arXiv 2307.15043)."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "steps": 500, "search_width": 512, "top": 256}

    name: Literal["gcg"] = "gcg"
    steps: int = Field(500, ge=1, le=MAX_STEPS, description="steps of the search")
    search_width: int = Field(512, ge=1, le=4096, description="candidates of one step")
    top: int = Field(256, ge=1, description="likeliest substitutes of each position by gradient")


@register(GcgConfig)
class GcgAttack(SuffixSearch[GcgConfig]):
    """Searches by gradient. `stats` of a response: queries, steps, survivor rate, loss at the start and at best."""

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        config, plain = self.config, super().cost(trials)
        passes = 1 + config.steps * ceil(config.search_width / _BATCH)
        return replace(plain, passes=plain.trials * passes, gradients=plain.trials * config.steps)

    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        import numpy as np

        suffix = found.best
        for step in range(self.config.steps):
            target.stop_if_cancelled()
            gradient_SV = box.suffix_gradient(found.problem, suffix)
            candidates = found.surviving(self.candidates(suffix, gradient_SV, usable, rng, step))
            if not candidates:
                found.note(suffix, found.losses[-1])  # a step without a survivor; the next draws others
                continue
            losses = found.ask(box, candidates, _BATCH)
            best = int(np.argmin(losses))
            suffix = candidates[best]
            found.note(suffix, losses[best])

    def candidates(
        self, suffix: tuple[int, ...], gradient_SV: FloatArray, usable: IntArray, rng: np.random.Generator, step: int
    ) -> list[tuple[int, ...]]:
        """Draws `search_width` suffixes that differ from the current one in one token.

        If they are fewer than its tokens, other positions have their turn in each step.
        """
        import numpy as np

        top = min(self.config.top, len(usable))
        best_ST = usable[least(gradient_SV[:, usable], top)]
        width = self.config.search_width
        positions = np.arange(width) * len(suffix) // width
        if width < len(suffix):
            positions = (positions + step) % len(suffix)
        picks = rng.integers(top, size=width)
        return [
            (*suffix[:position], int(best_ST[position, pick]), *suffix[position + 1 :])
            for position, pick in zip(positions.tolist(), picks.tolist(), strict=True)
        ]


def least(values_SU: FloatArray, count: int) -> IntArray:
    """Returns the places of the `count` least values of each row, in ascending order, equal ones from left to right.

    The same as the start of a stable argsort, without sorting the rest: .02 instead of .11 s a step at 128k tokens.
    """
    import numpy as np

    bounds_S1 = np.partition(values_SU, count - 1, axis=1)[:, count - 1 : count]
    places = [np.flatnonzero(row_U) for row_U in ~(values_SU > bounds_S1)]
    sorted_SK = [some[np.argsort(row_U[some], kind="stable")] for row_U, some in zip(values_SU, places, strict=True)]
    return np.stack([row_K[:count] for row_K in sorted_SK]).astype(np.int64)


class RandomSearchConfig(SuffixConfig):
    """Suffix by random search (Andriushchenko et al., arXiv 2404.02151), with as many queries as GCG by default."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "queries": 500 * 512}
    changes: ClassVar[int] = 4  # tokens that one candidate changes, at most

    name: Literal["random_search"] = "random_search"
    queries: int = Field(500 * 512, ge=1, le=1_000_000, description="candidates whose loss is asked for")
    batch: int = Field(64, ge=1, description="candidates of one step, the best of which is kept if it is better")

    def decisive(self) -> dict[str, Any]:
        return super().decisive() | self.constants("changes")


@register(RandomSearchConfig)
class RandomSearchAttack(SuffixSearch[RandomSearchConfig]):
    """Searches by chance, without gradients: the rate that GCG must exceed."""

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        plain = super().cost(trials)
        return replace(plain, passes=plain.trials * (1 + ceil(self.config.queries / self.config.batch)))

    def search(self, target: Target, box: WhiteBox, found: Search, usable: IntArray, rng: np.random.Generator) -> None:
        import numpy as np

        while found.queries < self.config.queries:
            target.stop_if_cancelled()
            count = min(self.config.batch, self.config.queries - found.queries)
            drawn = [self._changed(found.best, usable, rng) for _ in range(count)]
            candidates = found.surviving(drawn) or [found.best]
            losses = found.ask(box, candidates, self.config.batch)
            best = int(np.argmin(losses))
            if losses[best] < found.best_loss:
                found.note(candidates[best], losses[best])
            else:
                found.note(found.best, found.best_loss)

    def _changed(self, suffix: tuple[int, ...], usable: IntArray, rng: np.random.Generator) -> tuple[int, ...]:
        """Changes a few neighbouring tokens."""
        count = int(rng.integers(1, min(self.config.changes, len(suffix)) + 1))
        start = int(rng.integers(len(suffix) - count + 1))
        return (*suffix[:start], *rng.choice(usable, size=count).tolist(), *suffix[start + count :])


class SoftPromptConfig(SuffixConfig):
    """Continuous suffix, found by gradient (Schwinn et al., arXiv 2402.09063)."""

    standard: ClassVar[Mapping[str, Any]] = {**SuffixConfig.standard, "steps": 100}
    lr: ClassVar[float] = 0.05  # step of a coordinate, as a share of the root mean square of the embedding's entries
    ask_every: ClassVar[int] = 10  # steps after which the model is asked; each is a variant

    name: Literal["soft_prompt"] = "soft_prompt"
    steps: int = Field(100, ge=1, le=MAX_STEPS, description="steps of the search")

    def decisive(self) -> dict[str, Any]:
        decisive = super().decisive() | self.constants("lr")
        del decisive["steps"]  # of the longest variant
        return decisive

    @property
    def asked_after(self) -> list[int]:
        """Steps after which the model is asked."""
        return sorted({*range(self.ask_every, self.steps, self.ask_every), self.steps})


@register(SoftPromptConfig)
class SoftPromptAttack(SuffixAttack[SoftPromptConfig]):
    """Asks under a variant `step-<steps>` for each state of the suffix.

    `worst_of_n` is the rate of the best of them, as published rates are. The white box answers greedily itself.
    `stats` of a response: loss at the start and least loss until then.
    """

    rate_is_worst = True

    def cost(self, trials: Sequence[Trial]) -> TrialCost:
        plain, searches = super().cost(trials), len({trial.prompt.prompt_id for trial in trials})
        longest = max((trial.decoding.max_tokens for trial in trials), default=0)
        return replace(plain, passes=searches * longest, gradients=searches * self.config.steps)

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        started = [(prompt, self.start(target.answering, prompt)) for prompt in prompts]
        trials = []
        for step in self.config.asked_after:
            for prompt, found in started:
                settings = self.config.decisive() | {"step": step, "target_ids": found.problem.target}
                trials.append(self.trial(target, f"step-{step}", prompt, found.sequence, settings=settings))
        return trials

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        by_prompt = sorted(trials, key=lambda trial: (trial.prompt.prompt_id, trial.settings["step"]))
        searches = [list(group) for _, group in groupby(by_prompt, key=lambda trial: trial.prompt.prompt_id)]
        for asked, responses in side_by_side(target, searches, self._searched):
            emit(list(zip(asked, responses, strict=True)))

    def _searched(self, target: Target, box: WhiteBox, asked: Sequence[Trial]) -> list[Response]:
        """Searches the suffix of one behaviour, and asks the model once for all states of it that are wanted."""
        found = self.start(target.answering, asked[0].prompt)
        suffix_SH = box.suffix_embeddings(found.best)
        states: list[FloatArray] = []
        losses: list[float] = []
        least_losses: list[float] = []
        for before, step in pairwise([0, *(int(trial.settings["step"]) for trial in asked)]):
            target.stop_if_cancelled()
            suffix_SH, fallen = box.descend(found.problem, suffix_SH, step - before, self.config.lr)
            losses += fallen
            states.append(suffix_SH)
            least_losses.append(min(losses))
        target.stop_if_cancelled()
        max_tokens, eos_ids = asked[0].decoding.max_tokens, sorted(target.codec.eos_ids)
        answers = box.continue_embeddings(found.problem, states, max_tokens, eos_ids)
        stats = {"loss_start": round(losses[0], 4)}
        return [
            Response(trial.sequence, (), tuple(new), {**stats, "loss_best": round(loss, 4)})
            for trial, new, loss in zip(asked, answers, least_losses, strict=True)
        ]
