"""Measurements on held-back training prompts: compliance and base's words at depth, over-refusal, KL on answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raycomplete.data.samples import AnchorSample, SampleSet
from raycomplete.runtime.types import Outcome
from raycomplete.training.batches import MicroBatch, answer_batch
from raycomplete.training.checkpoints import from_rank_zero
from raycomplete.training.job import TrainJob
from raycomplete.training.profile import scored_samples
from raycomplete.training.steering import StepMeasurement
from raycomplete.training.student import PrefixBatch

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


class Validator:
    """Measures the student on held-back training prompts.

    Every rank reads and answers the same: under ZeRO-3 a forward pass needs all ranks anyway.

    Args:
        engine: DeepSpeed engine around the student.
        samples: Those held back are read.
        job: Scorers of aligned and base, judge, and settings of `train.validation`.
        per_device_batch_size: Sequences of a forward pass for the KL.
        packed: Whether they may share rows, as in training.
    """

    def __init__(
        self, engine: Any, samples: SampleSet, job: TrainJob, per_device_batch_size: int, *, packed: bool
    ) -> None:
        self._engine, self._samples, self._job = engine, samples, job
        self._size, self._packed = per_device_batch_size, packed
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
        """Batches of answers, with the hidden states of the frozen models that a loss term reads."""
        samples, scores = scored_samples(answers, {role: self._job.scorers[role] for role in roles})
        return [
            answer_batch(samples[start : start + self._size], scores, term=term, packed=self._packed)
            for start in range(0, len(samples), self._size)
        ]

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
