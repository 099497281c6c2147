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
from raycomplete.methods.registry import (
    AnchorItem,
    Feedback,
    Item,
    Method,
    RecoveryItem,
    RowSpan,
    TeacherContext,
    TrainSequence,
)
from raycomplete.training.packing import pack
from raycomplete.training.teacher_prefetcher import Scores


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one worker.

    Attributes:
        input_ids_BT: Rows of one or more sequences side by side, padded on the right; the last token of each sequence
            is left out, since nothing follows it.
        position_ids_BT: Position of each token in its own sequence, 0 on padding.
        row_N: Flat positions b * T + t whose next-token distribution is trained.
        term_N: Number of each row's loss term in `terms`.
        weight_N: Weight of each row: the loss of a term is a mean over its rows of the whole step.
        sequence_N: Which sequence of the micro-batch a row belongs to.
        token_N: Token that follows at each row.
        aligned_hidden_PH: The aligned model's hidden states of the rows that read it, in order; None if there are none.
        base_hidden_PH: The same of base.
        depth_S: Depth of each sequence, refusal prefixes left out, -1 where it has none.
        terms: Names of the loss terms.
        num_tokens: Tokens of all sequences, padding left out.
    """

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
    terms: tuple[str, ...]
    num_tokens: int

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the language model.

        Without an attention mask and without a cache, transformers reads the borders of the sequences of a row from
        where positions restart, and lets no sequence look at another.
        """
        return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT, "use_cache": False}

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


@dataclass(frozen=True)
class BatchBuilder:
    """Settings that every micro-batch of a run shares.

    Attributes:
        loss: Terms of the loss, and which teachers their rows read.
        scale: World size times micro-batches of a step; undoes the averaging of DeepSpeed, so that the loss is the
            exact mean over all rows of the step.
        packed: Whether sequences share rows; false for models that cannot keep them apart.
    """

    loss: LossSettings
    scale: float
    packed: bool = True

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
        """Packs the sequences of one micro-batch and lines up their rows with the teachers' hidden states.

        Args:
            sequences: Sequences of the forward pass.
            normalisers: Divisor of the row weights of each term, of the whole step.
            scores: Hidden states of the teachers; None where no term reads one.
            loss_weights: Factor on the row weights of each term; 1 where absent.
        """
        lengths = [len(sequence) for sequence in sequences]
        longest = max(lengths)
        places = pack(lengths) if self.packed else [(row, 0) for row in range(len(sequences))]
        shape = (1 + max(row for row, _ in places), longest)
        input_ids_BT = torch.zeros(shape, dtype=torch.long)
        position_ids_BT = torch.zeros(shape, dtype=torch.long)
        rows: list[_Rows] = []
        for index, (sequence, (row, column)) in enumerate(zip(sequences, places, strict=True)):
            tokens = torch.tensor(sequence.token_ids)
            columns = slice(column, column + lengths[index])
            input_ids_BT[row, columns] = tokens[:-1]
            position_ids_BT[row, columns] = torch.arange(lengths[index])
            rows += self._rows(sequence, tokens, index, row * longest + column, scores)
        numbers = {name: number for number, name in enumerate(self.loss.names)}
        factors = loss_weights or {}
        weights = [factors.get(part.term, 1.0) * self.scale / max(normalisers.get(part.term, 0), 1) for part in rows]
        counts = torch.tensor([part.row_T.numel() for part in rows])
        weight_N = torch.tensor(weights, dtype=torch.float32).repeat_interleave(counts)
        for part, weight_T in zip(rows, weight_N.split(counts.tolist()), strict=True):
            if part.weight_T is not None:
                weight_T *= part.weight_T
        hidden = {role: [part.hidden[role] for part in rows if role in part.hidden] for role in ("aligned", "base")}
        return MicroBatch(
            input_ids_BT=input_ids_BT,
            position_ids_BT=position_ids_BT,
            row_N=torch.cat([part.row_T for part in rows]),
            term_N=torch.tensor([numbers[part.term] for part in rows]).repeat_interleave(counts),
            weight_N=weight_N,
            sequence_N=torch.tensor([part.sequence for part in rows]).repeat_interleave(counts),
            token_N=torch.cat([part.token_T for part in rows]),
            aligned_hidden_PH=torch.cat(hidden["aligned"]) if hidden["aligned"] else None,
            base_hidden_PH=torch.cat(hidden["base"]) if hidden["base"] else None,
            depth_S=torch.tensor([sequence.depth for sequence in sequences]),
            terms=self.loss.names,
            num_tokens=sum(lengths),
        )

    def _rows(
        self, sequence: TrainSequence, tokens: Tensor, index: int, offset: int, scores: Scores | None
    ) -> list[_Rows]:
        """The trained rows of a sequence that starts at flat position `offset`; token t is predicted at t - 1."""
        hidden = [self._hidden(span, scores) for span in sequence.spans]
        # A sequence with a context that a teacher could not read keeps its place, and the others their weights.
        is_quarantined = any(
            len(rows_TH) < span.count
            for span, found in zip(sequence.spans, hidden, strict=True)
            for rows_TH in found.values()
        )
        parts = []
        for span, found in zip(sequence.spans, hidden, strict=True):
            count = 0 if is_quarantined else span.count
            parts.append(
                _Rows(
                    span.term,
                    index,
                    offset + torch.arange(span.start - 1, span.start - 1 + count),
                    tokens[span.start : span.start + count],
                    {role: rows_TH[:count] for role, rows_TH in found.items()},
                    None if span.weights is None else torch.tensor(span.weights[:count], dtype=torch.float32),
                )
            )
        return parts

    def _hidden(self, span: RowSpan, scores: Scores | None) -> dict[str, Tensor]:
        """Hidden states [count, H] of each teacher that a span reads; fewer where it could not be read."""
        found = {}
        for role in self.reads[span.term]:
            assert scores is not None, f"the term {span.term} reads {role}"
            assert span.context is not None, f"rows of the term {span.term} need a context"
            rows_TH = scores.hidden(role, span.context)
            if span.target_row is not None and len(rows_TH):
                rows_TH = rows_TH[span.target_row].expand(span.count, -1)
            found[role] = rows_TH[: span.count]
        return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a span: T positions, tokens, hidden states by teacher, and weights."""

    term: str
    sequence: int
    row_T: Tensor
    token_T: Tensor
    hidden: dict[str, Tensor]
    weight_T: Tensor | None


def teacher_contexts(
    builder: BatchBuilder, method: Method, anchor: Sequence[AnchorSample], recovery: Sequence[RecoverySample]
) -> dict[str, list[TeacherContext]]:
    """Lists what each frozen model must read for some samples, whatever depths they are cut at; term by term."""
    items: list[Item] = [AnchorItem(sample) for sample in anchor]
    items += [RecoveryItem(sample, len(sample.harmful_ids)) for sample in recovery]
    spans = [span for item in items for span in method.sequence(item, Feedback()).spans]
    spans.sort(key=lambda span: builder.loss.names.index(span.term))
    found: dict[str, list[TeacherContext]] = {"aligned": [], "base": []}
    for span in spans:
        for role in builder.reads[span.term]:
            assert span.context is not None, f"rows of the term {span.term} need a context"
            found[role].append(span.context)
    return found


def answer_batch(
    samples: Sequence[AnchorSample], scores: Scores | None = None, *, term: str = "nll", packed: bool = True
) -> MicroBatch:
    """A micro-batch of whole answers, which is looked at and not trained.

    Args:
        samples: Prompts with answers.
        scores: Hidden states of the teachers that the term reads.
        term: A loss term; decides which teachers' hidden states are in the batch.
        packed: Whether sequences may share rows.
    """
    sequences = []
    for sample in samples:
        prompt, answer = sample.prompt_ids, sample.answer_ids
        span = RowSpan(term, len(prompt), len(answer), TeacherContext(prompt, answer))
        sequences.append(TrainSequence(prompt + answer, (span,)))
    return BatchBuilder(LossSettings({term: 1.0}), 1.0, packed).build(sequences, {}, scores)


def cut_harmful(samples: Sequence[RecoverySample], max_tokens: int) -> tuple[RecoverySample, ...]:
    """Cuts h where no step reads on, so that teachers do not either."""
    return tuple(replace(sample, harmful_ids=sample.harmful_ids[:max_tokens]) for sample in samples)
