"""Scores for the trainer, asked for ahead of time so that it rarely waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.runtime.errors import QuarantinedSequenceError
from raycomplete.runtime.prometheus import record

logger = logging.getLogger(__name__)

Key = tuple[str, tuple[int, ...], int]


class ScoreSource(Protocol):
    """One frozen model. Implemented by `raycomplete.engines.scorers.TeacherClient`."""

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        """Starts reading (token ids, number of prompt tokens) and returns a reference."""

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Starts reading sequences that will be submitted later; returns at once."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        """Waits for [T, H] hidden states of each sequence's response rows."""


class Scores:
    """Hidden states of one step's sequences.

    Args:
        tensors: [T, H] by what was read; [0, H] of a sequence that was quarantined.
        max_depth: h is read up to here.
    """

    def __init__(self, tensors: Mapping[Key, torch.Tensor], max_depth: int) -> None:
        self._tensors = tensors
        self._max_depth = max_depth

    def hidden(self, role: str, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> torch.Tensor:
        """[T, H] of a response read by base or aligned; no rows where it was quarantined."""
        return self._tensors[(role, prompt_ids + response_ids, len(prompt_ids))]

    def harmful(self, sample: RecoverySample, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[depth, H] of h from aligned and from base; no rows where it was quarantined.

        h was read up to the largest depth, whatever depth was drawn later: a causal model's states of a prefix are
        the first states of the whole.
        """
        h = sample.harmful_ids[: self._max_depth]
        aligned_TH, base_TH = (self.hidden(role, sample.prompt_ids, h) for role in ("aligned", "base"))
        return aligned_TH[:depth], base_TH[:depth]


class TeacherPrefetcher:
    """Asks the frozen models for the sequences of a step and hands them out when the step comes.

    Args:
        sources: Scorers by role, "aligned" and (where the loss needs it) "base".
        max_depth: h is read up to here.
        penalty: Whether h is read at all.
        contrastive: Whether base also reads anchor answers and refusals.
    """

    def __init__(self, sources: Mapping[str, ScoreSource], *, max_depth: int, penalty: bool, contrastive: bool) -> None:
        self._sources = sources
        self._max_depth = max_depth
        self._penalty = penalty
        self._contrastive = contrastive
        self._pending: dict[int, list[tuple[str, list[tuple[tuple[int, ...], int]], Any]]] = {}
        self._no_rows: dict[str, torch.Tensor] = {}  # of each model: [0, H] in its dtype
        self.wait_s = 0.0

    def is_requested(self, step: int) -> bool:
        """Whether the scores of a step are on their way."""
        return step in self._pending

    def request(self, step: int, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> None:
        """Starts scoring a step's samples; asking twice does nothing."""
        if self.is_requested(step):
            return
        self._pending[step] = [
            (role, sequences, self._sources[role].submit_sequences(sequences))
            for role, sequences in self._wanted(anchor, recovery).items()
            if sequences
        ]

    def warm(self, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]) -> None:
        """Lets the scorers read samples of a later step ahead of its request."""
        for role, sequences in self._wanted(anchor, recovery).items():
            if sequences:
                self._sources[role].warm_sequences(sequences)

    def _wanted(
        self, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]
    ) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        """(token ids, number of prompt tokens) that each frozen model must read."""
        teacher = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in anchor]
        teacher += [
            (sample.teacher_prompt_ids + sample.refusal_ids, len(sample.teacher_prompt_ids)) for sample in recovery
        ]
        harmful = []
        if self._penalty:
            harmful = [
                (sample.prompt_ids + sample.harmful_ids[: self._max_depth], len(sample.prompt_ids))
                for sample in recovery
            ]
        return {"aligned": teacher + harmful, "base": harmful + (teacher if self._contrastive else [])}

    def take(self, step: int) -> Scores:
        """Waits for the scores of a requested step; the waiting time is added to `wait_s`.

        Raises:
            QuarantinedSequenceError: A model could read nothing at all. Single sequences that it cannot read have no rows.
        """
        started = time.perf_counter()
        tensors: dict[Key, torch.Tensor] = {}
        for role, sequences, reference in self._pending.pop(step):
            for (tokens, num_prompt), hidden_TH in zip(sequences, self._collect(role, reference), strict=True):
                tensors[(role, tokens, num_prompt)] = hidden_TH
        self.wait_s += time.perf_counter() - started
        record("queue_depth", len(self._pending), queue="teacher")
        return Scores(tensors, self._max_depth)

    def _collect(self, role: str, reference: Any) -> list[torch.Tensor]:
        """Scores in order, [0, H] in the place of a sequence that was quarantined."""
        try:
            found = self._sources[role].collect_tensors(reference)
        except QuarantinedSequenceError as error:
            no_rows = next((tensor[:0] for tensor in error.partial if tensor is not None), self._no_rows.get(role))
            if no_rows is None:
                raise
            logger.warning("Training goes on without them: %s", error)
            found = [no_rows if tensor is None else tensor for tensor in error.partial]
        self._no_rows[role] = found[0][:0].clone()  # a view would keep the whole tensor
        return found
