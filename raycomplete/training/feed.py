"""Scores for the trainer, asked for ahead of time so that it rarely waits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from raycomplete.observe import record
from raycomplete.training.samples import AnchorSample, RecoverySample

Key = tuple[str, tuple[int, ...], int]


class ScoreSource(Protocol):
    """One frozen model. Implemented by `raycomplete.scoring.actors.ScoringClient`."""

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        """Starts reading (token ids, number of prompt tokens) and returns a reference."""

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Starts reading sequences that will be submitted later; returns at once."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        """Waits for [T, H] hidden states of each sequence's response rows."""


class Scores:
    """Hidden states of one step's sequences."""

    def __init__(self, tensors: Mapping[Key, torch.Tensor], max_depth: int) -> None:
        self._tensors = tensors
        self._max_depth = max_depth

    def hidden(self, role: str, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> torch.Tensor:
        """[T, H] of a response read by base or aligned."""
        return self._tensors[(role, prompt_ids + response_ids, len(prompt_ids))]

    def harmful(self, sample: RecoverySample, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[depth, H] of h from aligned and from base.

        h was read up to the largest depth, whatever depth was drawn later: a causal model's states of a prefix are
        the first states of the whole.
        """
        h = sample.harmful_ids[: self._max_depth]
        aligned_TH, base_TH = (self.hidden(role, sample.prompt_ids, h) for role in ("aligned", "base"))
        return aligned_TH[:depth], base_TH[:depth]


class ScoreFeed:
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
        """Waits for the scores of a requested step; the waiting time is added to `wait_s`."""
        started = time.perf_counter()
        tensors: dict[Key, torch.Tensor] = {}
        for role, sequences, reference in self._pending.pop(step):
            for (tokens, num_prompt), hidden_TH in zip(
                sequences, self._sources[role].collect_tensors(reference), strict=True
            ):
                tensors[(role, tokens, num_prompt)] = hidden_TH
        self.wait_s += time.perf_counter() - started
        record("queue_depth", len(self._pending), queue="scoring")
        return Scores(tensors, self._max_depth)
