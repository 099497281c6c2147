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
        token_N: Token that follows at each row, or the one that its span names instead.
        aligned_hidden_PH: The aligned model's hidden states of the rows that read it, in order; None if there are none.
        base_hidden_PH: The same of base.
        depth_S: Depth of each sequence, refusal prefixes left out, -1 where it has none.
        suffix_S3: Flat position of the first token of each sequence's suffix, its length and its seed; zeros where it
            has none.
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
        hidden_size: Of the student; decides how wide packed rows are. None: no wider than the longest sequence.
    """

    loss: LossSettings
    scale: float
    packed: bool = True
    hidden_size: int | None = None

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
        places, width = [(row, 0) for row in range(len(sequences))], max(lengths)
        if self.packed:
            places, width = pack(lengths, self.hidden_size)
        shape = (1 + max(row for row, _ in places), width)
        input_ids_BT = torch.zeros(shape, dtype=torch.long)
        position_ids_BT = torch.zeros(shape, dtype=torch.long)
        # One entry a span. Token t is predicted at t - 1.
        rows: list[Tensor] = []
        tokens: list[Tensor] = []
        terms: list[Tensor] = []
        owners: list[Tensor] = []
        weights: list[Tensor] = []
        suffixes: list[tuple[int, int, int]] = []
        hidden: dict[str, list[Tensor]] = {"aligned": [], "base": []}
        for index, (sequence, (row, column)) in enumerate(zip(sequences, places, strict=True)):
            token_ids = torch.tensor(sequence.token_ids)
            columns = slice(column, column + lengths[index])
            input_ids_BT[row, columns] = token_ids[:-1]
            position_ids_BT[row, columns] = torch.arange(lengths[index])
            suffix = sequence.suffix
            suffixes.append((row * width + column + suffix.start, suffix.count, suffix.seed) if suffix else (0, 0, 0))
            for span, found in self._spans(sequence, scores):
                rows.append(row * width + column + torch.arange(span.start - 1, span.start - 1 + span.count))
                following = token_ids[span.start :] if span.token_ids is None else torch.tensor(span.token_ids)
                tokens.append(following[: span.count])
                terms.append(torch.full((span.count,), self.loss.names.index(span.term)))
                owners.append(torch.full((span.count,), index))
                weights.append(self._weights(span, normalisers, loss_weights or {}))
                for role, hidden_TH in found.items():
                    hidden[role].append(hidden_TH)
        return MicroBatch(
            input_ids_BT=input_ids_BT,
            position_ids_BT=position_ids_BT,
            row_N=torch.cat(rows),
            term_N=torch.cat(terms),
            weight_N=torch.cat(weights),
            sequence_N=torch.cat(owners),
            token_N=torch.cat(tokens),
            aligned_hidden_PH=torch.cat(hidden["aligned"]) if hidden["aligned"] else None,
            base_hidden_PH=torch.cat(hidden["base"]) if hidden["base"] else None,
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
        return [
            (replace(span, count=0), {role: hidden_TH[:0] for role, hidden_TH in hidden.items()})
            for span, hidden in found
        ]


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
