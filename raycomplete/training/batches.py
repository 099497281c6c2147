"""From planned items and their scores to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raycomplete.core.loss_types import TokenKind
from raycomplete.training.feed import Scores
from raycomplete.training.plan import AnchorItem, Item, StepPlan, length


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one worker.

    Attributes:
        input_ids_BT: Right-padded sequences; the last token of each is left out, since nothing follows it.
        attention_mask_BT: 1 on tokens, 0 on padding.
        row_N: Flat positions b * T + t whose next-token distribution is trained.
        kind_N: `TokenKind` of each row.
        weight_N: Weight of each row: the loss is a mean over the tokens of each kind in the whole step.
        item_N: Which item of the micro-batch a row belongs to.
        aligned_hidden_NH: Teacher's hidden state of each row.
        base_hidden_PH: Base's hidden state of each row that needs it, in order; None if there is none.
        depth_B: Depth of each recovery item, -1 for anchor items.
        target_N: Token at each row (SFT learns it; the completion loss does not look at it).
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    row_N: Tensor
    kind_N: Tensor
    weight_N: Tensor
    item_N: Tensor
    aligned_hidden_NH: Tensor | None
    base_hidden_PH: Tensor | None
    depth_B: Tensor
    target_N: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


@dataclass(frozen=True)
class BatchBuilder:
    """Settings that every micro-batch of a run shares.

    Attributes:
        penalty: Whether rows along h are trained.
        contrastive: Whether every row needs base.
        scale: World size times micro-batches of a step; undoes the averaging of DeepSpeed, so that the loss is the
            exact mean over all tokens of the step.
    """

    penalty: bool
    contrastive: bool
    scale: float

    def build(self, items: Sequence[Item], plan: StepPlan, scores: Scores | None) -> MicroBatch:
        """Pads the items of one micro-batch and lines up their rows with the teachers' hidden states.

        Args:
            items: Sequences of the forward pass.
            plan: The whole step that they belong to; its token counts normalise the weights.
            scores: Hidden states of the teachers; None in SFT, where there are no teachers.
        """
        longest = max(length(item) for item in items)
        input_ids_BT = torch.zeros(len(items), longest, dtype=torch.long)
        attention_mask_BT = torch.zeros(len(items), longest, dtype=torch.long)
        rows: list[_Rows] = []
        for index, item in enumerate(items):
            sequence, parts = self._parts(item, scores)
            input_ids_BT[index, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            attention_mask_BT[index, : len(sequence) - 1] = 1
            rows += [part.at(index, longest, sequence) for part in parts]
        weight_of = {
            TokenKind.ANCHOR: self.scale / max(plan.num_anchor_tokens, 1),
            TokenKind.RECOVERY: self.scale / max(plan.num_recovery_tokens, 1),
            TokenKind.PENALTY: self.scale / max(plan.num_penalty_tokens, 1),
        }
        aligned = [part.aligned_TH for part in rows if part.aligned_TH is not None]
        base = [part.base_TH for part in rows if part.base_TH is not None]
        counts = torch.tensor([part.row_T.numel() for part in rows])
        kinds = torch.tensor([int(part.kind) for part in rows])
        weights = torch.tensor([weight_of[part.kind] for part in rows], dtype=torch.float32)
        return MicroBatch(
            input_ids_BT=input_ids_BT,
            attention_mask_BT=attention_mask_BT,
            row_N=torch.cat([part.row_T for part in rows]),
            kind_N=kinds.repeat_interleave(counts),
            weight_N=weights.repeat_interleave(counts),
            item_N=torch.tensor([part.item for part in rows]).repeat_interleave(counts),
            aligned_hidden_NH=torch.cat(aligned) if aligned else None,
            base_hidden_PH=torch.cat(base) if base else None,
            depth_B=torch.tensor([-1 if isinstance(item, AnchorItem) else item.depth for item in items]),
            target_N=torch.cat([part.target_T for part in rows]),
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

    def at(self, index: int, longest: int, sequence: tuple[int, ...]) -> _Rows:
        """The run in a padded micro-batch: token `start` is predicted at position `start - 1`."""
        row_T = index * longest + torch.arange(self.start - 1, self.start - 1 + self.count)
        target_T = torch.tensor(sequence[self.start : self.start + self.count])
        return _Rows(self.kind, self.start, self.count, self.aligned_TH, self.base_TH, index, row_T, target_T)
