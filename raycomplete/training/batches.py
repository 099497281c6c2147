"""From planned items and their scores to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raycomplete.config import OpeningConfig
from raycomplete.losses.loss_types import TokenKind
from raycomplete.training.packing import pack
from raycomplete.training.step_plan import AnchorItem, Item, StepPlan, length
from raycomplete.training.teacher_prefetcher import Scores


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one worker.

    Attributes:
        input_ids_BT: Rows of one or more sequences side by side, padded on the right; the last token of each sequence
            is left out, since nothing follows it.
        position_ids_BT: Position of each token in its own sequence, 0 on padding.
        row_N: Flat positions b * T + t whose next-token distribution is trained.
        kind_N: `TokenKind` of each row.
        weight_N: Weight of each row: the loss is a mean over the tokens of each kind in the whole step, that of the
            anchor a weighted one.
        item_N: Which item of the micro-batch a row belongs to.
        aligned_hidden_NH: Teacher's hidden state of each row.
        base_hidden_PH: Base's hidden state of each row that needs it, in order; None if there is none.
        depth_B: Depth of each recovery item, refusal prefixes left out, -1 for anchor items.
        target_N: Token at each row (SFT learns it; the completion loss does not look at it).
        num_tokens: Tokens of all sequences, padding left out.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    row_N: Tensor
    kind_N: Tensor
    weight_N: Tensor
    item_N: Tensor
    aligned_hidden_NH: Tensor | None
    base_hidden_PH: Tensor | None
    depth_B: Tensor
    target_N: Tensor
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
class Emphasis:
    """Factors on the weights of rows, moved by what is measured during training.

    Attributes:
        anchor: On anchor rows, see `raycomplete.training.anchor_multiplier`.
        penalty_by_depth: On penalty rows by their depth, refusal prefixes left out [longest h]; None leaves all alike.
    """

    anchor: float = 1.0
    penalty_by_depth: Tensor | None = None


@dataclass(frozen=True)
class BatchBuilder:
    """Settings that every micro-batch of a run shares.

    Attributes:
        penalty: Whether rows along h are trained.
        contrastive: Whether every row needs base.
        scale: World size times micro-batches of a step; undoes the averaging of DeepSpeed, so that the loss is the
            exact mean over all tokens of the step.
        opening: Which anchor tokens count more than others.
        packed: Whether sequences share rows; false for models that cannot keep them apart.
    """

    penalty: bool
    contrastive: bool
    scale: float
    opening: OpeningConfig = field(default_factory=OpeningConfig)
    packed: bool = True

    def build(
        self, items: Sequence[Item], plan: StepPlan, scores: Scores | None, emphasis: Emphasis | None = None
    ) -> MicroBatch:
        """Packs the items of one micro-batch and lines up their rows with the teachers' hidden states.

        Args:
            items: Sequences of the forward pass.
            plan: The whole step that they belong to; its token counts normalise the weights.
            scores: Hidden states of the teachers; None in SFT, where there are no teachers.
            emphasis: Factors on the weights that change as training goes on.
        """
        emphasis = emphasis or Emphasis()
        lengths = [length(item) for item in items]
        longest = max(lengths)
        places = pack(lengths) if self.packed else [(row, 0) for row in range(len(items))]
        shape = (1 + max(row for row, _ in places), longest)
        input_ids_BT = torch.zeros(shape, dtype=torch.long)
        position_ids_BT = torch.zeros(shape, dtype=torch.long)
        rows: list[_Rows] = []
        for index, (item, (row, column)) in enumerate(zip(items, places, strict=True)):
            sequence, parts = self._parts(item, scores)
            if any(part.is_quarantined for part in parts):  # it keeps its place, and the others their weights
                parts = [part.without_rows() for part in parts]
            span = slice(column, column + lengths[index])
            input_ids_BT[row, span] = torch.tensor(sequence[:-1])
            position_ids_BT[row, span] = torch.arange(lengths[index])
            rows += [part.at(index, row * longest + column, sequence) for part in parts]
        anchor_sum = plan.num_anchor_tokens + (self.opening.weight - 1) * plan.num_opening_tokens(self.opening.tokens)
        weight_of = {
            TokenKind.ANCHOR: emphasis.anchor * self.scale / max(anchor_sum, 1),
            TokenKind.RECOVERY: self.scale / max(plan.num_recovery_tokens, 1),
            TokenKind.PENALTY: self.scale / max(plan.num_penalty_tokens, 1),
        }
        aligned = [part.aligned_TH for part in rows if part.aligned_TH is not None]
        base = [part.base_TH for part in rows if part.base_TH is not None]
        counts = torch.tensor([part.row_T.numel() for part in rows])
        kinds = torch.tensor([int(part.kind) for part in rows])
        weights = torch.tensor([weight_of[part.kind] for part in rows], dtype=torch.float32)
        weight_N = weights.repeat_interleave(counts)
        for part, weight_T in zip(rows, weight_N.split(counts.tolist()), strict=True):
            if part.kind is TokenKind.ANCHOR:
                weight_T[: self.opening.tokens] *= self.opening.weight
            elif part.kind is TokenKind.PENALTY and emphasis.penalty_by_depth is not None:
                weight_T *= emphasis.penalty_by_depth[_depths(items[part.item], part.count)]
        return MicroBatch(
            input_ids_BT=input_ids_BT,
            position_ids_BT=position_ids_BT,
            row_N=torch.cat([part.row_T for part in rows]),
            kind_N=kinds.repeat_interleave(counts),
            weight_N=weight_N,
            item_N=torch.tensor([part.item for part in rows]).repeat_interleave(counts),
            aligned_hidden_NH=torch.cat(aligned) if aligned else None,
            base_hidden_PH=torch.cat(base) if base else None,
            depth_B=torch.tensor([-1 if isinstance(item, AnchorItem) else item.answer_depth for item in items]),
            target_N=torch.cat([part.target_T for part in rows]),
            num_tokens=sum(lengths),
        )

    def _parts(self, item: Item, scores: Scores | None) -> tuple[tuple[int, ...], list[_Rows]]:
        """The sequence of an item and its runs of trained rows."""
        sample = item.sample
        if isinstance(item, AnchorItem):
            answer = item.sample.answer_ids
            start = len(sample.prompt_ids)
            part = self._rows(TokenKind.ANCHOR, start, len(answer), sample.prompt_ids, answer, scores)
            return sample.prompt_ids + answer, [part]
        recovery = item.sample
        harmful = recovery.harmful_ids[: item.depth]
        start = len(recovery.prompt_ids)
        parts = []
        if self.penalty and item.depth > 0:
            assert scores is not None, "the penalty needs scores"
            aligned_DH, base_DH = scores.harmful(recovery, item.depth)
            parts.append(_Rows(TokenKind.PENALTY, start, item.depth, aligned_DH, base_DH))
        refusal = recovery.refusal_ids
        parts.append(
            self._rows(
                TokenKind.RECOVERY, start + item.depth, len(refusal), recovery.teacher_prompt_ids, refusal, scores
            )
        )
        return recovery.prompt_ids + harmful + refusal, parts

    def _rows(
        self,
        kind: TokenKind,
        start: int,
        count: int,
        context: tuple[int, ...],
        response: tuple[int, ...],
        scores: Scores | None,
    ) -> _Rows:
        if scores is None:
            return _Rows(kind, start, count, None, None)
        aligned = scores.hidden("aligned", context, response)
        base = scores.hidden("base", context, response) if self.contrastive else None
        return _Rows(kind, start, count, aligned, base)


def _depths(item: Item, count: int) -> Tensor:
    """Depth of each row of h [count]: as cuts, it is counted from after a refusal prefix, which stands at depth 0."""
    turn = 0 if isinstance(item, AnchorItem) else item.sample.refusal_prefix_tokens
    return (torch.arange(count) - turn).clamp(min=0)


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class _Rows:
    """A run of trained rows of one item; `start` is the sequence position of its first predicted token."""

    kind: TokenKind
    start: int
    count: int
    aligned_TH: Tensor | None
    base_TH: Tensor | None
    item: int = 0
    row_T: Tensor = field(default_factory=_no_tokens)
    target_T: Tensor = field(default_factory=_no_tokens)

    @property
    def is_quarantined(self) -> bool:
        """Whether a teacher could not read it."""
        return any(rows_TH is not None and len(rows_TH) < self.count for rows_TH in (self.aligned_TH, self.base_TH))

    def without_rows(self) -> _Rows:
        """The same with nothing to train."""
        aligned, base = (None if rows_TH is None else rows_TH[:0] for rows_TH in (self.aligned_TH, self.base_TH))
        return replace(self, count=0, aligned_TH=aligned, base_TH=base)

    def at(self, index: int, offset: int, sequence: tuple[int, ...]) -> _Rows:
        """The run of item `index`, whose sequence starts at flat position `offset`; token t is predicted at t - 1."""
        row_T = offset + torch.arange(self.start - 1, self.start - 1 + self.count)
        target_T = torch.tensor(sequence[self.start : self.start + self.count])
        return _Rows(self.kind, self.start, self.count, self.aligned_TH, self.base_TH, index, row_T, target_T)
