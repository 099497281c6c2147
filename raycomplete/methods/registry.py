"""The base class of training methods, and the table of methods; docs/add-a-method.md shows how to write one.

A method is the section `method` of the run file. It says which rows of which sequences a step trains, what the teachers
read for them, and which loss terms have which weights. The trainer asks it for all of that.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.losses.settings import LossSettings
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs, Teacher, Term
    from raycomplete.losses.torch_rows import TermRows


@dataclass(frozen=True, slots=True)
class AnchorItem:
    """An anchor sample that a step trains; in a graded rollout the answer is the student's (see `RecoveryItem`)."""

    sample: AnchorSample
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class RecoveryItem:
    """A recovery sample that a step trains, h cut at `depth`, a refusal prefix included.

    If a method trains rollouts as they are (`Method.rollout_groups`), h ends at the cut and the "refusal" is whatever
    the student wrote after it.
    """

    sample: RecoverySample
    depth: int
    first_id: int | None = None  # aligned's own first token, where the refusal of `sample` continues h in another one
    advantage: float = 0.0  # standard deviations by which the reward exceeds the mean of its group
    drawn: int = 0  # the depth as drawn, where h may end before it

    @classmethod
    def cut(cls, sample: RecoverySample, depth: int) -> RecoveryItem:
        """h cut at `depth` tokens after a refusal prefix, or at its end."""
        return cls(sample, min(sample.refusal_prefix_tokens + depth, len(sample.harmful_ids)), drawn=depth)

    @property
    def answer_depth(self) -> int:
        """Tokens of the compliant answer that the student reads."""
        return self.depth - self.sample.refusal_prefix_tokens

    def draws(self, *, once: bool = False) -> random.Random:
        """Random numbers of the sample and its drawn depth, or with `once` of the sample, the same on every worker."""
        of_sample = f"{self.sample.sample_id}:{self.sample.harmful_ids}"  # h is drawn under the run's seed
        return random.Random(of_sample if once else f"{of_sample}:{self.drawn or self.depth}")

    def redrawn_cut(self, plain_fraction: float, *, once: bool = False, spare: int = 0) -> int:
        """A cut of all of h as rivals draw it: 0 in a fraction of the draws, else uniform on 1 .. |h| - spare."""
        longest = len(self.sample.harmful_ids) - spare
        rng = self.draws(once=once)
        return 0 if rng.random() < plain_fraction or longest < 1 else rng.randint(1, longest)


@dataclass(frozen=True, slots=True)
class RolloutGroups:
    """Rollouts that a step trains as they are: so many of each prompt and cut, a fraction of which follow x alone."""

    each: int
    plain_fraction: float = 0.0


Item = AnchorItem | RecoveryItem
# Computes the loss of a micro-batch from the whole student: (StudentModule, MicroBatch) -> LossOutput. See
# `raycomplete.training.student.StudentModule.total`.
StudentPass = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class TeacherContext:
    """A response that the frozen models read after a prompt; it has one row a response token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Consecutive rows of a sequence that one loss term trains."""

    term: str
    start: int  # position in the sequence of the first token that they predict
    count: int  # tokens that they predict
    # What the teachers read; `count` of its rows belong to these. None for a term that reads none. It must not depend
    # on the depth of an item, which is not known yet when the context is read.
    context: TeacherContext | None = None
    offset: int = 0  # row of the context that belongs to the first row
    # Context and row of the aligned model for every row, where all share one target; base still reads `context`.
    target: tuple[TeacherContext, int] | None = None
    weights: Sequence[float] | None = None  # factor on the weight of each row
    token_ids: tuple[int, ...] | None = None  # tokens that the term reads in place of those that follow there


@dataclass(frozen=True, slots=True)
class Suffix:
    """A suffix of a prompt that a method moves: `count` tokens from position `start` on, and the seed of its draws."""

    start: int
    count: int
    seed: int


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """A sequence that the student reads, and its trained rows."""

    token_ids: tuple[int, ...]  # the last one is predicted, but not read
    spans: tuple[RowSpan, ...]
    depth: int = -1  # tokens of a compliant answer before the refusal, for the depth sampler; -1 without one
    suffix: Suffix | None = None  # a suffix of the prompt that the method moves

    def __len__(self) -> int:
        """Tokens that the student reads."""
        return len(self.token_ids) - 1


@dataclass(frozen=True, eq=False)
class OwnTerm:
    """A loss term that a method brings along (see `Term`), described without torch."""

    name: str
    label: str
    description: str
    # Gives the loss of each row from log-probabilities, or the loss and metrics by name. The name of a term of the
    # table stands for that one's formula, reads and options, None for what a `StudentPass` computes.
    formula: Callable[[LogProbs, Any], Tensor | tuple[Tensor, dict[str, Tensor]]] | str | None = None
    reads: tuple[Teacher, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    options: type[Section] = Section
    sequence_loss: Callable[[Tensor, Any], Tensor] | None = None


@cache
def made_term(own: OwnTerm) -> Term:
    """The term of the loss: the same object for the same description."""
    from raycomplete.losses.terms import Term, computed_in_pass, get
    from raycomplete.losses.torch_rows import TermRows

    formula = own.formula
    if isinstance(formula, str):
        return replace(get(formula), name=own.name, label=own.label, description=own.description)

    def rows_of(rows: LogProbs, options: Any) -> TermRows:
        assert callable(formula)
        found = formula(rows, options)
        return TermRows(*found) if isinstance(found, tuple) else TermRows(found)

    rest: dict[str, Any] = {key: getattr(own, key) for key in ("reads", "metrics", "options", "sequence_loss")}
    return Term(own.name, own.label, own.description, computed_in_pass if formula is None else rows_of, **rest)


class DepthConfig(Section):
    """Depths from which recovery is trained."""

    # What `adaptive` follows; compliance is counted on the student's rollouts.
    measure: ClassVar[Literal["recovery_loss", "compliance"]] = "recovery_loss"
    bins: ClassVar[int] = 8  # ranges of depths that are measured together
    uniform_floor: ClassVar[float] = 0.3  # share of draws that stays uniform
    decay: ClassVar[float] = 0.9  # memory of the running mean of the loss by depth

    min: int = Field(1, ge=1, description="shallowest cut of h, in tokens; position 0 is the opening's or the anchor's")
    max: int = Field(64, ge=1, description="deepest cut of h, in tokens")
    schedule: Literal["adaptive", "uniform"] = Field(
        "uniform", description="adaptive draws most where recovery is still incomplete"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DepthConfig:
        if self.max < self.min:
            raise ValueError(f"method.depth.max ({self.max}) is below method.depth.min ({self.min})")
        return self


class LongestHarmful(DepthConfig):
    """Only `max` counts, the longest h (100 tokens): the method draws its cuts itself."""

    max: int = Field(100, ge=1, description="longest harmful continuation, in tokens")


class Method(Section):
    """A training method: it says what a step trains."""

    name: str = Field(description="which method")
    anchor_batch_size: int = Field(16, ge=1, description="anchor sequences of a step, over all workers")
    borderline_fraction: float | None = Field(
        None, ge=0, le=1, description="share of those that are borderline prompts; null: in proportion to their number"
    )
    recovery_batch_size: int = Field(16, ge=1, description="recovery items of a step, over all workers")
    depth: DepthConfig = Field(default_factory=DepthConfig)

    terms: ClassVar[tuple[OwnTerm, ...]] = ()  # loss terms that the method brings along
    depth_term: ClassVar[str | None] = None  # whose loss an adaptive depth schedule follows; None draws evenly
    needs_lora: ClassVar[bool] = False  # compares the student with its start, by turning its adapters off
    recovery_sequences: ClassVar[int] = 1  # that `sequences` makes of a recovery item, for plans
    needs_fresh_rollouts: ClassVar[bool] = False  # the formula holds for rollouts of the present weights only
    perturbs_layers: ClassVar[bool] = False  # reads a batch several times a backward pass, with other inner states
    # Settings of `train` of its authors, by dotted key, and other departures from them, for the notes of a study.
    published: ClassVar[tuple[tuple[str, Any], ...]] = ()
    departures: ClassVar[tuple[str, ...]] = ()
    # Terms that are summed over the rows of a sequence and averaged over sequences; others are means over rows.
    per_sequence: ClassVar[frozenset[str]] = frozenset()

    @property
    def rollout_groups(self) -> RolloutGroups | None:
        """Groups of graded rollouts that a step trains as they are; None where recovery is made of rollouts."""
        return None

    @property
    def moves_suffixes(self) -> bool:
        """It moves suffixes of prompts, and `rollout.prompt_augmentation` must give some prompts one."""
        return False

    @property
    def extra_passes(self) -> float:
        """Forward and backward passes of the student over its sequences beyond the one of plain training, for plans."""
        return 0.0

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term (`raycomplete.losses.terms`) by name, in the order of metrics and figures."""
        raise NotImplementedError

    def loss_options(self) -> dict[str, Section]:
        """Settings of the terms where they are not the terms' defaults, by name."""
        return {}

    def student_pass(self, lm: Any) -> StudentPass | None:
        """Replaces forward pass and loss of the student `lm`, a transformers model; may load torch."""
        return None

    def schedule(self, progress: float) -> dict[str, float]:
        """Factors on the weights of terms, when that share of the steps is done or being done; none is 0."""
        return {}

    def sequence(self, item: Item) -> TrainSequence:
        """The tokens that the student reads for an item, and the rows that are trained; `sequences` may replace it."""
        raise NotImplementedError

    def sequences(self, item: Item) -> tuple[TrainSequence, ...]:
        """All sequences of an item, as many for each item of a kind, in one micro-batch; by default one."""
        return (self.sequence(item),)

    def trained(self, samples: Iterable[AnchorSample]) -> tuple[AnchorSample, ...]:
        """Leaves out samples of which no row is trained: they would only take the place of others in a step."""
        return tuple(
            sample
            for sample in samples
            if any(span.count for found in self.sequences(AnchorItem(sample)) for span in found.spans)
        )

    def normalisers(self, sequences: Iterable[TrainSequence]) -> dict[str, float]:
        """Divisor of each term's row weights, from all sequences of a step: by default their sum.

        Each term then is a mean over its rows or, if it is in `per_sequence`, over its sequences.
        """
        sums: Counter[str] = Counter()
        for sequence in sequences:
            for span in sequence.spans:
                whole = span.term in self.per_sequence
                rows = span.count if span.weights is None else sum(span.weights)
                sums[span.term] += (span.count > 0) if whole else rows  # type: ignore[assignment]
        return dict(sums)

    def loss(self) -> LossSettings:
        """Settings of the loss; the method's own terms are in the table from then on."""
        for own in self.terms:
            made_term(own).add()
        return LossSettings(self.loss_weights(), self.loss_options())


def harmless_answer(item: AnchorItem, term: str, *, is_read: bool = False) -> TrainSequence:
    """A harmless or borderline prompt and aligned's answer, all of whose tokens are rows of a term.

    Harmful prompts have no rows: a method that trains nothing else of anchor items leaves them out. With `is_read` the
    frozen models read the answer too.
    """
    sample = item.sample
    prompt, answer = sample.prompt_ids, sample.kept_ids
    read = TeacherContext(sample.plain_prompt_ids, answer) if is_read else None
    span = RowSpan(term, len(prompt), len(answer), read)
    return TrainSequence(prompt + answer, () if sample.kind == "harmful" else (span,))


M = TypeVar("M", bound=Method)
METHODS: dict[str, type[Method]] = {}


def register(method: type[M]) -> type[M]:
    """Adds a method to the table, under the default of its `name`; a class decorator.

    Raises:
        ValueError: There is one of that name already.
    """
    name = method.model_fields["name"].default
    if name in METHODS:
        raise ValueError(f"There is a training method {name!r} already.")
    METHODS[name] = method
    return method


def method_class(name: str) -> type[Method]:
    """Looks up a method, or raises a ConfigError."""
    if name not in METHODS:
        raise ConfigError(
            f"There is no training method {name!r}.",
            f"Known methods: {', '.join(sorted(METHODS))}; a method of your own needs its file under plugins.",
        )
    return METHODS[name]


def parse_method(settings: Mapping[str, Any]) -> Method:
    """Checks the section `method` of a run file; without a name it is `completion`."""
    return method_class(str(settings.get("name", "completion"))).model_validate(settings)
