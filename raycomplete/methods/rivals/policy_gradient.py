"""Policy gradient on the student's own rollouts, relative to their group, with a KL penalty: RL beside distillation.

Source: group-relative policy optimisation, arXiv 2402.03300, known to us by secondary sources. Each prompt and cut of h
is rolled out several times. The reward is the judge's: 1 for refusing a harmful prompt after h<D and for not
refusing a harmless one, else 0. With A the reward less the mean of its group over its standard deviation, and y what
the student wrote after c = (x, h<D), or x alone where x is harmless:

    mean over rollouts of -A / |y| sum_t log p_s(y_t | c, y<t)  +  kl_weight * mean over tokens of KL(p_s || p_a)

Theirs besides: kl_weight 0.04, groups of 64, `train: {lr: 1.0e-6}`. Their clipped ratio is 1 where a rollout is trained
once, without rollouts ahead and under `rollout.sync_every` 1. The KL penalty pulls towards what aligned does after h. A
quarter of the harmful groups follow x alone, to keep refusals.

A group whose rollouts all comply teaches nothing. On the organism aligned complies in every rollout after h, so 40
steps learn nothing there, and at a rate of distillation (1e-3) the penalty alone lets the student drift.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from raycomplete.losses.settings import DivergenceSettings
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    Method,
    OwnTerm,
    RolloutGroups,
    RowSpan,
    TeacherContext,
    TrainSequence,
    register,
)
from raycomplete.runtime.section import Section


@register
class PolicyGradient(Method):
    """Group-relative policy gradient: rewards for refusing after h, and for not refusing harmless prompts."""

    name: Literal["policy_gradient"] = "policy_gradient"
    kl_weight: float = Field(0.04, ge=0, description="weight of KL(student || aligned) along the rollouts")

    group_size: ClassVar[int] = 8  # rollouts of each prompt and cut
    plain_fraction: ClassVar[float] = 0.25  # share of harmful groups that follow the prompt alone
    per_sequence = frozenset({"policy"})
    needs_fresh_rollouts = True
    published = (("train.lr", 1e-06),)
    departures = (
        "KL is exact over the vocabulary, not estimated from samples, and reads the compliant beginning too",
        "each rollout is trained once, without a clipped ratio",
        "by default groups of 8, not 64, a quarter of the harmful ones after the prompt alone",
    )

    terms = (  # advantages are weights of rows
        OwnTerm("policy", "policy", "-log p_s of the student's own words times their advantage", "nll"),
        OwnTerm("kl_aligned", "KL to aligned", "KL(student || aligned)", "anchor"),
    )

    @property
    def rollout_groups(self) -> RolloutGroups:
        return RolloutGroups(self.group_size, self.plain_fraction)

    def loss_weights(self) -> dict[str, float]:
        return {"policy": 1.0, "kl_aligned": self.kl_weight}

    def loss_options(self) -> dict[str, Section]:
        return {"kl_aligned": DivergenceSettings(divergence="reverse_kl")}

    def sequence(self, item: Item) -> TrainSequence:
        """The words that the student read and wrote; harmful prompts among anchor items have no rows."""
        if isinstance(item, AnchorItem):
            given, written = item.sample.answer_ids[:0], item.sample.answer_ids
            if item.sample.kind == "harmful":
                return TrainSequence(item.sample.prompt_ids + written, ())
        else:
            given, written = item.sample.harmful_ids[: item.depth], item.sample.refusal_ids
        prompt, count = item.sample.prompt_ids, len(written)
        read = TeacherContext(prompt, given + written)
        start = len(prompt) + len(given)
        spans = (
            RowSpan("policy", start, count, weights=[item.advantage / max(count, 1)] * count),
            RowSpan("kl_aligned", start, count, read, offset=len(given)),
        )
        return TrainSequence(prompt + given + written, spans, len(given) or -1)

    @model_validator(mode="after")
    def _whole_groups(self) -> PolicyGradient:
        if self.anchor_batch_size % self.group_size or self.recovery_batch_size % self.group_size:
            raise ValueError(
                "method.anchor_batch_size and method.recovery_batch_size must be multiples of the group of "
                f"{self.group_size} rollouts"
            )
        return self
