"""Hidden states of the teachers, asked for ahead of time so that the trainer rarely waits, and the steps they serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.engines.scorers import TeacherClient
from raycomplete.methods.registry import TeacherContext
from raycomplete.runtime.errors import QuarantinedSequenceError
from raycomplete.runtime.prometheus import record
from raycomplete.training.job import TrainJob
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan

logger = logging.getLogger(__name__)

Sequences = list[tuple[tuple[int, ...], int]]
"""Pairs (token ids, number of prompt tokens)."""
Contexts = Callable[[Sequence[AnchorSample], Sequence[RecoverySample]], Mapping[str, Sequence[TeacherContext]]]
"""Lists what each frozen model must read for some samples, by role."""


@dataclass(frozen=True)
class Scores:
    """Hidden states of the teachers over one step's sequences, and the seconds that the caller waited for them.

    `tensors` holds [T, H] of the response rows by (role, token ids, number of prompt tokens); [0, H] where the sequence
    was quarantined.
    """

    tensors: Mapping[tuple[str, tuple[int, ...], int], torch.Tensor]
    wait_s: float

    def hidden(self, role: str, context: TeacherContext) -> torch.Tensor:
        """[T, H] of a response read by base or aligned; no rows where it was quarantined."""
        return self.tensors[(role, context.prompt_ids + context.response_ids, len(context.prompt_ids))]


class TeacherPrefetcher:
    """Asks the frozen models for the sequences of a step and yields their hidden states when the step comes.

    `contexts` must cover whatever depths are drawn later: a causal model's states of a prefix are the first states of
    the whole.
    """

    def __init__(self, scorers: Mapping[str, TeacherClient], contexts: Contexts) -> None:
        self._scorers, self._contexts = scorers, contexts
        self._pending: dict[int, list[tuple[str, Sequences, Any]]] = {}
        self._no_rows: dict[str, torch.Tensor] = {}  # [0, H] in the dtype of each model

    def request(self, step: int, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> None:
        """Asks the models to read a step's samples; asking twice does nothing."""
        if step not in self._pending:
            self._pending[step] = [
                (role, sequences, self._scorers[role].submit_sequences(sequences))
                for role, sequences in self._wanted(anchor, recovery).items()
            ]

    def warm(self, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> None:
        """Lets the models read samples of a later step ahead of its request."""
        for role, sequences in self._wanted(anchor, recovery).items():
            self._scorers[role].warm_sequences(sequences)

    def _wanted(self, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> dict[str, Sequences]:
        """The sequences that each frozen model must read; models that need none are left out."""
        return {
            role: [(item.prompt_ids + item.response_ids, len(item.prompt_ids)) for item in contexts]
            for role, contexts in self._contexts(anchor, recovery).items()
            if contexts
        }

    def take(self, step: int) -> Scores:
        """Waits for the hidden states of a requested step."""
        started = time.perf_counter()
        tensors = {}
        for role, sequences, reference in self._pending.pop(step):
            for (tokens, num_prompt), hidden_TH in zip(sequences, self._collect(role, reference), strict=True):
                tensors[(role, tokens, num_prompt)] = hidden_TH
        record("queue_depth", len(self._pending), queue="teacher")
        return Scores(tensors, time.perf_counter() - started)

    def _collect(self, role: str, reference: Any) -> list[torch.Tensor]:
        """Hidden states in order, [0, H] in the place of a sequence that was quarantined."""
        try:
            found = self._scorers[role].collect_tensors(reference)
        except QuarantinedSequenceError as error:
            no_rows = next((tensor[:0] for tensor in error.partial if tensor is not None), self._no_rows.get(role))
            if no_rows is None:
                raise
            logger.warning("Training goes on without them: %s", error)
            found = [no_rows if tensor is None else tensor for tensor in error.partial]
        self._no_rows[role] = found[0][:0].clone()  # a view would keep the whole tensor
        return found


@dataclass(frozen=True)
class StepInput:
    """The sequences of one step."""

    plan: StepPlan  # of all workers
    scores: Scores  # over this worker's share
    stats: dict[str, Any]  # for the row of metrics
    compliance: tuple[list[float], list[int]] | None = None  # (complied, asked) by depth bin; None off-policy


@dataclass
class StepSource:
    """Yields steps made of samples that were drawn before training; the teachers read `job.prefetch` steps ahead.

    `raycomplete.training.on_policy.OnPolicySource` yields rollouts of the student instead.
    """

    job: TrainJob
    planner: Planner
    prefetcher: TeacherPrefetcher
    sampler: DepthSampler
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self.share = slice(self.rank, None, self.world_size)  # this worker's items

    def next(self, step: int) -> StepInput:
        """Waits for the input of a step and asks for later ones; every rank must call this."""
        plan = self.planner.plan(step, self.sampler)
        for ahead in range(step, min(step + 1 + self.job.prefetch, self.job.train.steps)):
            anchor, recovery = self.planner.samples_of(ahead)
            self.prefetcher.request(ahead, anchor[self.share], recovery[self.share])
        scores = self.prefetcher.take(step)
        return StepInput(plan, scores, {"teacher_wait_s": scores.wait_s})

    def can_stop(self, finished: int) -> bool:
        """Says that a run resumed after so many steps continues as one that never stopped."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """State that seed, step and sampler do not tell, as plain JSON types; complete on rank 0."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved run; every rank gets what rank 0 saved."""
