"""From the sequences of a step and their scores to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import active_terms
from raycomplete.methods.registry import AnchorItem, Item, Method, RecoveryItem, RowSpan, TeacherContext, TrainSequence
from raycomplete.training.teacher_prefetcher import Scores

_WIDTHS = 16  # steps between the longest sequence and twice as much


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one worker."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    row_N: Tensor
    term_N: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    token_N: Tensor
    aligned_hidden_PH: Tensor | None
    base_hidden_PH: Tensor | None
    depth_S: Tensor
    suffix_S3: Tensor
    terms: tuple[str, ...]
    num_tokens: int

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the language model.

        Without an attention mask and without a cache, transformers reads the borders of the sequences of a row from
        where positions restart, and lets no sequence look at another.
        """
        return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT, "use_cache": False}

    def without(self, terms: Sequence[str]) -> MicroBatch:
        """The same without the rows of terms that read no teacher."""
        left_out = self.term_N.new_tensor([self.terms.index(term) for term in terms])
        kept_N = ~torch.isin(self.term_N, left_out)
        names = ("row_N", "term_N", "weight_N", "sequence_N", "token_N")
        return replace(self, **{name: getattr(self, name)[kept_N] for name in names})

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class BatchBuilder:
    """Settings that every micro-batch of a run shares."""

    loss: LossSettings
    scale: float  # world size times micro-batches of a step: undoes the averaging of DeepSpeed
    packed: bool = True  # sequences share rows; false for models that cannot keep them apart
    hidden_size: int | None = None  # the student's; decides how much wider than a sequence packed rows may be

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Frozen models that the rows of each term read."""
        return {name: item.teachers for name, item in zip(self.loss.names, active_terms(self.loss), strict=True)}

    def build(
        self,
        sequences: Sequence[TrainSequence],
        normalisers: Mapping[str, float],
        scores: Scores | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> MicroBatch:
        """Packs the sequences of one micro-batch and lines up their rows with the teachers' hidden states."""
        lengths = [len(sequence) for sequence in sequences]
        places, width = [(row, 0) for row in range(len(sequences))], max(lengths)
        if self.packed:
            places, width = pack(lengths, self.hidden_size)
        shape = (1 + max(row for row, _ in places), width)
        input_ids_BT = torch.zeros(shape, dtype=torch.long)
        position_ids_BT = torch.zeros(shape, dtype=torch.long)
        # One entry a span. Token t is predicted at t - 1.
        parts: dict[str, list[Tensor]] = {name: [] for name in ("row", "token", "term", "sequence", "weight")}
        suffixes: list[tuple[int, int, int]] = []
        hidden: dict[str, list[Tensor]] = {"aligned": [], "base": []}
        for index, (sequence, (row, column)) in enumerate(zip(sequences, places, strict=True)):
            token_ids = torch.tensor(sequence.token_ids)
            columns = slice(column, column + lengths[index])
            input_ids_BT[row, columns] = token_ids[:-1]
            position_ids_BT[row, columns] = torch.arange(lengths[index])
            suffix, first = sequence.suffix, row * width + column
            suffixes.append((first + suffix.start, suffix.count, suffix.seed) if suffix else (0, 0, 0))
            for span, found in self._spans(sequence, scores):
                parts["row"].append(first + torch.arange(span.start - 1, span.start - 1 + span.count))
                following = token_ids[span.start :] if span.token_ids is None else torch.tensor(span.token_ids)
                parts["token"].append(following[: span.count])
                parts["term"].append(torch.full((span.count,), self.loss.names.index(span.term)))
                parts["sequence"].append(torch.full((span.count,), index))
                parts["weight"].append(self._weights(span, normalisers, loss_weights or {}))
                for role, hidden_TH in found.items():
                    hidden[role].append(hidden_TH)
        joined: dict[str, Any] = {f"{name}_N": torch.cat(values) for name, values in parts.items()}
        joined |= {f"{role}_hidden_PH": torch.cat(states) if states else None for role, states in hidden.items()}
        return MicroBatch(
            input_ids_BT=input_ids_BT,
            position_ids_BT=position_ids_BT,
            **joined,
            depth_S=torch.tensor([sequence.depth for sequence in sequences]),
            suffix_S3=torch.tensor(suffixes),
            terms=self.loss.names,
            num_tokens=sum(lengths),
        )

    def _weights(self, span: RowSpan, normalisers: Mapping[str, float], loss_weights: Mapping[str, float]) -> Tensor:
        weight = loss_weights.get(span.term, 1.0) * self.scale / max(normalisers.get(span.term, 0), 1)
        weight_T = torch.full((span.count,), weight, dtype=torch.float32)
        if span.weights is not None:
            weight_T *= torch.tensor(span.weights[: span.count], dtype=torch.float32)
        return weight_T

    def _spans(self, sequence: TrainSequence, scores: Scores | None) -> list[tuple[RowSpan, dict[str, Tensor]]]:
        """Spans of a sequence with the hidden states [count, H] of each teacher that they read.

        A sequence with a context that a teacher could not read keeps its place without rows, and the others their
        weights.
        """
        found = []
        for span in sequence.spans:
            hidden: dict[str, Tensor] = {}
            for role, context in _contexts(span, self.reads[span.term]):
                assert scores is not None, f"the term {span.term} reads {role}"
                hidden_TH = scores.hidden(role, context)
                if role == "aligned" and span.target is not None:
                    row = span.target[1]
                    hidden[role] = hidden_TH[row : row + 1].expand(span.count if len(hidden_TH) else 0, -1)
                else:
                    hidden[role] = hidden_TH[span.offset : span.offset + span.count]
            found.append((span, hidden))
        if all(len(hidden_TH) == span.count for span, hidden in found for hidden_TH in hidden.values()):
            return found
        return [(replace(span, count=0), {role: rows[:0] for role, rows in hidden.items()}) for span, hidden in found]


def teacher_contexts(
    builder: BatchBuilder, method: Method, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]
) -> dict[str, list[TeacherContext]]:
    """Lists what each frozen model must read for some samples, whatever depths they are cut at; term by term."""
    items: list[Item] = [AnchorItem(sample) for sample in anchor]
    items += [RecoveryItem(sample, len(sample.harmful_ids)) for sample in recovery]
    spans = [span for item in items for found in method.sequences(item) for span in found.spans]
    spans.sort(key=lambda span: builder.loss.names.index(span.term))
    found: dict[str, list[TeacherContext]] = {"aligned": [], "base": []}
    for span in spans:
        for role, context in _contexts(span, builder.reads[span.term]):
            if span.target is None or context not in found[role]:  # a shared target is often read anyway
                found[role].append(context)
    return found


def _contexts(span: RowSpan, roles: Sequence[str]) -> list[tuple[str, TeacherContext]]:
    """Pairs a span's teachers with what they read for it."""
    found = []
    for role in roles:
        context = span.target[0] if role == "aligned" and span.target is not None else span.context
        assert context is not None, f"rows of the term {span.term} need a context"
        found.append((role, context))
    return found


def answer_batch(
    samples: Sequence[AnchorSample], scores: Scores | None = None, *, term: str = "nll", packed: bool = True
) -> MicroBatch:
    """A micro-batch of whole answers that is measured and not trained, with the hidden states that a term reads."""
    sequences = []
    for sample in samples:
        prompt, answer = sample.prompt_ids, sample.answer_ids
        span = RowSpan(term, len(prompt), len(answer), TeacherContext(prompt, answer))
        sequences.append(TrainSequence(prompt + answer, (span,)))
    return BatchBuilder(LossSettings({term: 1.0}), 1.0, packed).build(sequences, {}, scores)


def cut_harmful(samples: Sequence[RecoverySample], max_tokens: int) -> tuple[RecoverySample, ...]:
    """Truncates h to the longest prefix any step can train on, so teachers do not score more."""
    return tuple(replace(sample, harmful_ids=sample.harmful_ids[:max_tokens]) for sample in samples)


def pack(lengths: Sequence[int], hidden_size: int | None) -> tuple[list[tuple[int, int]], int]:
    """Places sequences in rows of the width that costs the least, from the longest sequence to twice as much.

    A wider row fits more sequences without a gap, but attention within a row costs its width squared: about as much as
    the rest of a layer where the width is 6 times the hidden size. Without a hidden size, rows are no wider than the
    longest sequence.
    """
    longest = max(lengths, default=0)
    if hidden_size is None:
        return _best_fit(lengths, longest)

    def cost(packed: tuple[list[tuple[int, int]], int]) -> float:
        """Tokens that a forward pass computes, with attention counted as tokens."""
        places, width = packed
        rows = 1 + max((row for row, _ in places), default=-1)
        return rows * width * (1 + width / (6 * hidden_size))

    return min((_best_fit(lengths, longest + longest * step // _WIDTHS) for step in range(_WIDTHS + 1)), key=cost)


def _best_fit(lengths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """Places sequences, longest first, where the least room is left; the width returned is the widest row's."""
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row, left in enumerate(room) if left >= lengths[index]]
        if not fits:
            room.append(width)
        row = min(fits, key=lambda candidate: room[candidate]) if fits else len(room) - 1
        places[index] = (row, width - room[row])
        room[row] -= lengths[index]
    return places, width - min(room, default=width)
