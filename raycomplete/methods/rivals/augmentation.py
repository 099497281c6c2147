"""Refusal augmentation after Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep".

Source: arXiv 2406.05946; its code, Unispac/shallow-vs-deep-alignment (`trainer/trainer.py`). Cross-entropy of aligned's
refusal after x and h cut at D, where D is 0 in half of the draws and uniform on 1 .. min(100, |h|) else, and of
aligned's answers to harmless prompts: one mean over the tokens of both.

Theirs besides: 256 triples, 160 steps, AdamW beta1 0.9, `train: {lr: 2.0e-5, warmup_steps: 0}`, 4 devices with 4 safety
and 16 utility samples each (the defaults here). Set `rollout.refusal_prefix_fraction` and `rollout.mid_answer_fraction`
to 0 for samples such as theirs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import RecoveryItem, TrainSequence, register
from raycomplete.methods.rivals.shared import Rival, refusal_after


@register
class Augmentation(Rival):
    """Refusal augmentation: cross-entropy of aligned's refusal after h cut anywhere, and of its harmless answers."""

    name: Literal["augmentation"] = "augmentation"
    anchor_batch_size: int = Field(64, ge=1, description="harmless answers of a step, over all workers")

    plain_fraction: ClassVar[float] = 0.5  # share of refusals that follow the prompt alone
    published = (("train.lr", 2e-05), ("train.warmup_steps", 0), ("train.steps", 160))
    departures = (
        "beta2 and the schedule of the learning rate are this trainer's",
        "triples are samples of the run, and harmless prompts are its harmless and borderline ones, not Alpaca's",
    )

    def loss_weights(self) -> dict[str, float]:
        return {"nll": 1.0}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        return (refusal_after(item, item.redrawn_cut(self.plain_fraction), "nll"),)
