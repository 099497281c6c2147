"""Refusal augmentation after Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep".

Source: arXiv 2406.05946; its code, Unispac/shallow-vs-deep-alignment (`trainer/trainer.py`). Cross-entropy of aligned's
refusal after x and h cut at D, where D is 0 in half of the draws and uniform on 1 .. min(100, |h|) else, and of
aligned's answers to harmless prompts: one mean over the tokens of both.

Theirs besides: 256 triples, 160 steps, AdamW beta1 0.9, `train: {lr: 2.0e-5, warmup_steps: 0}`, 4 devices with 4 safety
and 16 utility samples each (the defaults here). Set `rollout.refusal_prefix_fraction` and `rollout.mid_answer_fraction`
to 0 for samples such as theirs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    RecoveryItem,
    RowSpan,
    TrainSequence,
    harmless_answer,
    register,
)


@register
class Augmentation(Method):
    """Refusal augmentation: cross-entropy of aligned's refusal after h cut anywhere, and of its harmless answers."""

    name: Literal["augmentation"] = Field("augmentation", description="which method")
    anchor_batch_size: int = Field(64, ge=1, description="harmless answers of a step, over all workers")
    recovery_batch_size: int = Field(16, ge=1, description="refusals of a step, over all workers")
    plain_fraction: float = Field(0.5, ge=0, le=1, description="share of refusals that follow the prompt alone")
    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    published = (("train.lr", 2e-05), ("train.warmup_steps", 0), ("train.steps", 160))
    departures = (
        "beta2 and the schedule of the learning rate are this trainer's",
        "triples are samples of the run, and harmless prompts are its harmless and borderline ones, not Alpaca's",
    )

    def loss_weights(self) -> dict[str, float]:
        """The cross-entropy alone."""
        return {"nll": 1.0}

    def sequence(self, item: Item) -> TrainSequence:
        """A harmless prompt and its answer, or x, h up to a cut of its own, and the refusal."""
        if isinstance(item, AnchorItem):
            return harmless_answer(item, "nll")
        return self.refusal(item, item.redrawn_cut(self.plain_fraction))

    def refusal(self, item: RecoveryItem, cut: int) -> TrainSequence:
        """x, h<D and the refusal, whose tokens are learned."""
        prompt, refusal = item.sample.prompt_ids, item.sample.refusal_ids
        span = RowSpan("nll", len(prompt) + cut, len(refusal))
        return TrainSequence(prompt + item.sample.harmful_ids[:cut] + refusal, (span,), cut)
