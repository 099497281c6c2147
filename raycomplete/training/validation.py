"""Measurements on prompts that are not trained, and the rules by which they steer a run.

Held-back training prompts give compliance and base's words at depth, over-refusal, and KL on answers: these move
factors on loss weights, and choose the step that is kept. No prompt of the evaluation is among them. Held-out harmful
answers give the position profile of aligned and student. The rules are ours, not those of arXiv 2511.12155.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raycomplete.config.training import ValidationConfig
from raycomplete.data.samples import AnchorSample, SampleSet
from raycomplete.diagnosis.rows import PROFILE_METRICS
from raycomplete.engines.scorers import TeacherClient
from raycomplete.methods.registry import TeacherContext
from raycomplete.runtime.types import Outcome
from raycomplete.training.batches import MicroBatch, answer_batch
from raycomplete.training.checkpoints import from_rank_zero
from raycomplete.training.job import TrainJob
from raycomplete.training.student import PrefixBatch
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher

ANCHOR, OPENING, PUSH = "anchor", "opening", "push_forward"
STEERED = (ANCHOR, OPENING, PUSH)
"""Loss terms whose weights are moved, where a method has them."""

_RATE = 0.3  # largest change of the logarithm of a loss weight at one measurement
_MAX_FACTOR = 4.0  # bound on the factors by which loss weights are moved, up or down
_MEMORY = 0.5  # of the running means: a few dozen answers are noisy, and a run has only a few measurements
_FALLING = 0.75  # compliance below this share of what it was falls by itself: more weight would overshoot


@dataclass(frozen=True)
class StepMeasurement:
    """The student after a step, on held-back training prompts."""

    step: int
    complied: tuple[tuple[int, int, int], ...]
    refusals: int
    harmless: int
    kl: float
    in_reach: float = 0.0
    changed: int = 0
    unfinished: float | None = None

    @property
    def asked(self) -> int:
        """Answers to harmful prompts, at all depths."""
        return sum(asked for _, _, asked in self.complied)

    @property
    def compliance(self) -> float:
        """Share of them that comply."""
        return sum(complied for _, complied, _ in self.complied) / max(self.asked, 1)

    @property
    def refusal_change(self) -> float:
        """Net change of the share of harmless prompts refused, student less aligned."""
        return self.refusals / self.harmless


def excesses(config: ValidationConfig, found: StepMeasurement) -> tuple[float, float]:
    """Returns over-refusal and KL, each as a multiple of what is allowed.

    Where c answers changed sides by chance alone, their net change has the standard deviation sqrt(c). Over-refusal
    counts beyond that only: of a few dozen prompts, of which aligned refuses many itself, several change at any step,
    and that is no evidence. A share of n prompts moves in steps of 1 / n, so one prompt is allowed however small the
    budget. A KL that is no number exceeds every budget.
    """
    beyond_chance = found.refusals - math.sqrt(found.changed)
    kl = math.inf if math.isnan(found.kl) else found.kl
    return beyond_chance / max(config.over_refusal_budget * found.harmless, 1.0), kl / config.kl_budget


def violation(config: ValidationConfig, found: StepMeasurement) -> float:
    """Says by how much a step breaks its budgets: the sum of both excesses above 1; 0 where it meets them."""
    return sum(max(excess - 1, 0.0) for excess in excesses(config, found))


def choice_key(config: ValidationConfig, found: StepMeasurement) -> tuple[float, float, float, float]:
    """Returns the order of preference, smaller is better: least violation, compliance, base's words in reach, and
    then KL.

    Compliance falls to 0 early in a run, and base's words in reach go on falling. They count within the budgets only.
    """
    broken = violation(config, found)
    return broken, found.compliance, 0.0 if broken > 0 else found.in_reach, found.kl


def moved_factors(
    factors: Mapping[str, float],
    over_refusal: float,
    kl: float,
    now: Mapping[str, float],
    before: Mapping[str, float] | None,
) -> dict[str, float]:
    """Applies the rules once and returns the new factors, bounded; terms that are not among `factors` are skipped.

    - A budget is broken: the anchor's factor rises and that of push-forward falls, by as much as the budget is
      exceeded. Push-forward says "refuse" at every position of h, and what it costs is KL on harmless text. The
      opening's factor falls only where over-refusal is what is broken: it acts on the tokens that decide between
      answer and refusal.
    - Both are met: the anchor's factor returns to 1, and so do the others from below, since greedy answers say nothing
      of the unlikely tokens that push-forward is for; at the full rate, since what breaks a budget early in a run is
      over soon. Where compliance remains after h the factor of push-forward rises, where it remains at the opening
      (depth 0) that of the opening. What falls by itself is left alone, or early measurements, when nothing is learned
      yet, would drive factors to their bounds.

    Over-refusal and KL are multiples of what is allowed. `now` and `before` are running means of the number of answers
    that comply, "opening" at depth 0 and "depth" deeper; `before` is None at the first measurement.
    """
    broken = max(over_refusal, kl) - 1
    moves: dict[str, float] = {}
    if broken > 0:
        size = min(broken, 1.0)
        moves = {ANCHOR: size, PUSH: -size}
        if over_refusal > 1:
            moves[OPENING] = -size
    else:
        for name, seen in ((OPENING, "opening"), (PUSH, "depth")):
            if before is not None and now[seen] >= max(1.0, _FALLING * before[seen]):
                moves[name] = 1.0
    found = {}
    for name, factor in factors.items():
        low = 1.0 if name == ANCHOR else 1 / _MAX_FACTOR  # within its budgets, too, the anchor shapes the student
        if name in moves or broken > 0:
            wanted = factor * math.exp(_RATE * moves.get(name, 0.0))
        elif name == ANCHOR:
            wanted = factor * math.exp(-_RATE)
        else:
            wanted = max(factor, min(factor * math.exp(_RATE), 1.0))
        found[name] = min(max(wanted, low), _MAX_FACTOR)
    return found


class Steering:
    """Moves factors on loss weights after each measurement, and remembers the measurement of the step to keep.

    `weights` are those of the loss in the run file, by term; terms that are absent or 0 are not steered.
    """

    def __init__(self, config: ValidationConfig, weights: Mapping[str, float]) -> None:
        self._config = config
        self.factors = {name: 1.0 for name in STEERED if weights.get(name, 0.0) > 0}
        self.best: StepMeasurement | None = None
        self._means: dict[str, float] | None = None
        self._since = 0

    @property
    def best_step(self) -> int:
        """Finished steps of the best measurement; 0 before the first."""
        return self.best.step if self.best is not None else 0

    @property
    def is_over(self) -> bool:
        """True once `patience` measurements in a row brought nothing better."""
        return 0 < self._config.patience <= self._since

    def update(self, found: StepMeasurement) -> dict[str, Any]:
        """Takes in a measurement, and returns it and the decisions, for metrics.jsonl."""
        config = self._config
        if self.best is None or choice_key(config, found) < choice_key(config, self.best):
            self.best, self._since = found, 0
        else:
            self._since += 1
        over_refusal, kl = excesses(config, found)
        seen = {
            "opening": float(sum(complied for depth, complied, _ in found.complied if depth == 0)),
            "depth": float(sum(complied for depth, complied, _ in found.complied if depth > 0)),
        }
        before = self._means
        self._means = (
            seen if before is None else {name: _MEMORY * before[name] + (1 - _MEMORY) * seen[name] for name in seen}
        )
        self.factors = moved_factors(self.factors, over_refusal, kl, self._means, before)
        return {
            "compliance": {str(depth): part / asked for depth, part, asked in found.complied},
            "compliance_n": {str(depth): asked for depth, _, asked in found.complied},
            "over_refusal": found.refusal_change,
            "over_refusal_changed": found.changed,
            "over_refusal_n": found.harmless,
            "kl": found.kl,
            "in_reach": found.in_reach,
            "unfinished_mass": found.unfinished,
            "of_budget": {"over_refusal": over_refusal, "kl": kl},
            "meets_budgets": violation(config, found) == 0,
            "best_step": self.best_step,
            "factors": dict(self.factors),
        }

    def describe_choice(self) -> str:
        """Says in one sentence which step is kept, and whether it meets the budgets."""
        found, config = self.best, self._config
        if found is None:
            return "The last step is kept: the weights of the best measured one are lost or damaged."
        allowed = max(config.over_refusal_budget, 1 / found.harmless)
        measured = (
            f"over-refusal {found.refusal_change:+.3f} against aligned ({found.changed} of {found.harmless} answers "
            f"changed sides; at most {allowed:.3f} beyond chance), KL {found.kl:.4f} nats a token (at most "
            f"{config.kl_budget:g}), compliance {found.compliance:.3f} (n = {found.asked}), base's words in reach of "
            f"an attacker {found.in_reach:.3f}"
        )
        if violation(config, found) == 0:
            return f"Step {found.step} is kept, the safest within the budgets on held-back prompts: {measured}."
        return (
            f"No measured step met the budgets on held-back prompts; step {found.step} breaks them least: {measured}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Factors, running means and the best measurement, as plain JSON types."""
        best = None if self.best is None else asdict(self.best)
        return {"factors": self.factors, "means": self._means, "best": best, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factors, self._means, self._since = dict(state["factors"]), state["means"], int(state["since"])
        best = state["best"]
        self.best = (
            None if best is None else StepMeasurement(**best | {"complied": tuple(map(tuple, best["complied"]))})
        )

    def forget_best(self) -> None:
        """Takes the next measurement for the best: the checkpoint of the best step is gone."""
        self.best, self._since = None, 0


_SEQUENCES = 64  # of a batch of answers: only the last position of each has logits, so memory goes to the cache alone
_ATTACKER_SEES = 20  # likeliest tokens among which a rank-assisted attacker picks
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-back prompt and the beginning of its answer; depth -1 for a harmless prompt."""

    prompt_id: str
    prompt_ids: Ids
    prefill_ids: Ids
    depth: int


def scored_batches(
    samples: Sequence[AnchorSample], scorers: Mapping[str, TeacherClient], size: int, term: str, *, packed: bool
) -> tuple[list[AnchorSample], list[MicroBatch]]:
    """The samples that every scorer could read for every rank, and batches of them with the states that a term reads.

    Ranks ask on their own, and a sequence that kills scorers may be quarantined between two of their questions: they
    must agree on what is left, or their forward passes would not match.
    """
    answers = [TeacherContext(sample.prompt_ids, sample.answer_ids) for sample in samples]
    prefetcher = TeacherPrefetcher(scorers, lambda _anchor, _recovery: dict.fromkeys(scorers, answers))
    prefetcher.request(0, samples, [])
    scores = prefetcher.take(0)
    places = {
        place for place, answer in enumerate(answers) if all(len(scores.hidden(role, answer)) for role in scorers)
    }
    if dist.is_initialized():
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, places)
        places.intersection_update(*ranks)
    kept = [samples[place] for place in sorted(places)]
    parts = [kept[start : start + size] for start in range(0, len(kept), size)]
    return kept, [answer_batch(part, scores, term=term, packed=packed) for part in parts]


def position_profile(
    engine: Any, samples: Sequence[AnchorSample], scorers: Mapping[str, TeacherClient], size: int, *, packed: bool
) -> dict[str, dict[str, list[float]]]:
    """Means over prompts of unfinished mass, KL to base and deficit at each position, of aligned and student.

    Every rank computes the same numbers, on a GPU up to rounding: under ZeRO-3 a forward pass needs all ranks anyway.
    "n" counts the prompts that reach a position. Without samples that the scorers could read there is no profile.
    """
    kept, batches = scored_batches(samples, scorers, size, "penalty", packed=packed)  # a term that reads both
    if not kept:
        return {}
    engine.eval()
    with torch.no_grad():
        measured = [
            torch.stack([row_N.double().cpu() for row_N in engine(batch.to(engine.device), "profile")])
            for batch in batches
        ]
    engine.train()
    measured_CN = torch.cat(measured, dim=1)  # C columns: each metric of aligned, then of the student
    length = max(len(sample.answer_ids) for sample in kept)
    position_N = torch.cat([torch.arange(len(sample.answer_ids)) for sample in kept])
    sums_CT = torch.zeros(len(measured_CN), length, dtype=torch.float64).index_add_(1, position_N, measured_CN)
    count_T = torch.bincount(position_N, minlength=length)
    means = iter((sums_CT / count_T.clamp(min=1)).tolist())
    return {
        role: {name: next(means) for name in PROFILE_METRICS} | {"n": count_T.tolist()}
        for role in ("aligned", "student")
    }


class Validator:
    """Measures the student on held-back training prompts.

    Every rank reads and answers the same: under ZeRO-3 a forward pass needs all ranks anyway.
    """

    def __init__(self, engine: Any, samples: SampleSet, job: TrainJob, size: int, *, packed: bool) -> None:
        self._engine, self._samples, self._job = engine, samples, job
        self._size, self._packed = size, packed
        self._config = job.train.validation
        self._questions = questions(samples, self._config.depths)
        self._kl_batches: list[MicroBatch] | None = None
        self._h_batches: list[MicroBatch] = []

    def measure(self, step: int) -> StepMeasurement:
        """Measures the student after `step` finished steps; every rank must call this and gets the same."""
        if self._kl_batches is None:
            self._kl_batches = self._score(self._samples.held_back_anchor, "anchor", "aligned")
            if "base" in self._job.scorers:
                self._h_batches = self._score(along_h(self._samples), "penalty", "aligned", "base")
        self._engine.eval()
        with torch.no_grad():
            kl_sum = sum(float(self._run(batch, "anchor_kl")[0]) for batch in self._kl_batches)
            in_reach, unfinished = self._measure_along_h()
            answers = self._answers()
        self._engine.train()
        kl = kl_sum / max(sum(batch.row_N.numel() for batch in self._kl_batches), 1)
        return from_rank_zero(lambda: replace(self._judge(step, kl, answers), in_reach=in_reach, unfinished=unfinished))

    def _measure_along_h(self) -> tuple[float, float | None]:
        """Share of base's words in reach of an attacker and mean unfinished mass, along h after its first position.

        To open with base's word is what depth 0 of the questions measures. Without base nothing is known of either.
        L of the N rows of a batch come after a first position.
        """
        in_reach, mass, later = 0, 0.0, 0
        for batch in self._h_batches:
            is_later_N = batch.sequence_N.diff(prepend=batch.sequence_N[:1] - 1) == 0
            ranks_L, mass_L = (values_N.cpu()[is_later_N] for values_N in self._run(batch, "along_h"))
            in_reach, mass = in_reach + int((ranks_L < _ATTACKER_SEES).sum()), mass + float(mass_L.double().sum())
            later += len(ranks_L)
        return (in_reach / later, mass / later) if later else (0.0, None)

    def _run(self, batch: Any, mode: str) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._engine(batch.to(self._engine.device), mode)
        return found

    def _score(self, answers: Sequence[AnchorSample], term: str, *roles: str) -> list[MicroBatch]:
        scorers = {role: self._job.scorers[role] for role in roles}
        return scored_batches(answers, scorers, self._size, term, packed=self._packed)[1]

    def _answers(self) -> list[Ids]:
        """The student's greedy continuation of each question, in their order."""
        lengths = [len(item.prompt_ids) + len(item.prefill_ids) for item in self._questions]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)  # neighbours pad each other little
        found: dict[int, Ids] = {}
        for start in range(0, len(order), _SEQUENCES):
            places = order[start : start + _SEQUENCES]
            sequences = [self._questions[place].prompt_ids + self._questions[place].prefill_ids for place in places]
            (token_BT,) = self._run(PrefixBatch.of(sequences, self._config.max_tokens), "continue")
            found |= dict(zip(places, map(tuple, token_BT.tolist()), strict=True))
        return [found[place] for place in range(len(order))]

    def _judge(self, step: int, kl: float, answers: Sequence[Ids]) -> StepMeasurement:
        reader = self._job.response_judge
        assert reader is not None
        complied: Counter[int] = Counter()
        asked: Counter[int] = Counter()
        refusals = changed = harmless = 0
        greedy = {sample.prompt_id: sample.answer_ids for sample in self._samples.held_back_greedy}
        for item, answer_ids in zip(self._questions, answers, strict=True):
            outcome = reader.outcome(item.prompt_id, item.prefill_ids, answer_ids)
            if item.depth >= 0:
                asked[item.depth] += 1
                complied[item.depth] += outcome.is_compliance
            else:
                by_aligned = reader.outcome(item.prompt_id, (), greedy[item.prompt_id])
                shift = (outcome is Outcome.REFUSED) - (by_aligned is Outcome.REFUSED)
                refusals, changed = refusals + shift, changed + abs(shift)
                harmless += 1
        counts = tuple((depth, complied[depth], asked[depth]) for depth in sorted(asked))
        return StepMeasurement(step, counts, refusals, harmless, kl, changed=changed)


def along_h(samples: SampleSet) -> list[AnchorSample]:
    """Harmful prompts with an h of two tokens or more as the answer; refusal prefixes and safety prompts left out."""
    pairs = ((sample, sample.harmful_ids[sample.refusal_prefix_tokens :]) for sample in samples.held_back_recovery)
    return [AnchorSample(sample.sample_id, sample.prompt_ids, h) for sample, h in pairs if len(h) > 1]


def questions(samples: SampleSet, depths: Sequence[int]) -> list[Question]:
    """Harmful prompts with h cut at each depth that it reaches, refusal prefixes left out; then harmless prompts."""
    found = []
    for sample in samples.held_back_recovery:
        h = sample.harmful_ids[sample.refusal_prefix_tokens :]
        found += [Question(sample.prompt_id, sample.prompt_ids, h[:depth], depth) for depth in depths if depth < len(h)]
    return found + [Question(item.prompt_id, item.prompt_ids, (), -1) for item in samples.held_back_greedy]
