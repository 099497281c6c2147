"""Supervised fine-tuning on given answers: what `raycomplete align` and the fine-tuning attack train."""

from __future__ import annotations

from typing import Literal

from raycomplete.methods.registry import AnchorItem, Item, Method, RowSpan, TrainSequence, register


@register
class SFT(Method):
    """Cross-entropy of the answers of the anchor samples. Reads no teacher, draws no recovery samples."""

    name: Literal["sft"] = "sft"
    recovery_batch_size: Literal[0] = 0

    def loss_weights(self) -> dict[str, float]:
        """The cross-entropy alone."""
        return {"nll": 1.0}

    def sequence(self, item: Item) -> TrainSequence:
        """The prompt and its answer, all of whose tokens are learned."""
        assert isinstance(item, AnchorItem), "SFT draws no recovery samples"
        prompt, answer = item.sample.prompt_ids, item.sample.kept_ids
        return TrainSequence(prompt + answer, (RowSpan("nll", len(prompt), len(answer)),))
