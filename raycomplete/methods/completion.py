"""Deep alignment by distillation from a hybrid teacher: anchor, recovery, and the penalty on base-favored tokens.

anchor: along the aligned model's own answers to all prompts, the student stays at the aligned model.
recovery: after x and a compliant beginning h<D, the student says what aligned says after x alone. The teacher does not
see h: it reads x, then the refusal.
penalty: along h, tokens that base says more than aligned lose their probability, most where alignment changed nothing.

The formulas are ours, not those of arXiv 2511.12155, which is known to us by its abstract and secondary reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from raycomplete.losses.settings import ContrastiveSettings, Divergence, DivergenceSettings, PenaltySettings
from raycomplete.methods.registry import (
    AnchorItem,
    ConstraintConfig,
    Feedback,
    Item,
    Method,
    RecoveryItem,
    RowSpan,
    TeacherContext,
    TrainSequence,
    register,
)
from raycomplete.runtime.section import Section


class LossWeights(Section):
    """Weights of the three terms of the loss."""

    anchor: float = Field(1.0, ge=0, description="stays at the aligned model along its own answers")
    recovery: float = Field(1.0, ge=0, description="says the aligned model's refusal after a compliant beginning")
    penalty: float = Field(0.1, ge=0, description="takes probability from base-favored tokens along that beginning")


class FirstTokensConfig(Section):
    """First tokens of an anchor answer: where it is decided whether it becomes an answer or a refusal."""

    count: int = Field(8, ge=1, description="how many tokens are the first ones")
    weight: float = Field(
        1.0, ge=1, description="weight of each of them, where every later token has 1; the sum stays 1"
    )


class PenaltyConfig(PenaltySettings):
    """Base-favored penalty."""

    follow_depth: bool = Field(False, description="scale the penalty at a depth by what is still incomplete there")


@register
class Completion(Method):
    """Anchor, recovery and penalty."""

    name: Literal["completion"] = Field("completion", description="which method")
    recovery_batch_size: int = Field(16, ge=1, description="recovery sequences of a step, over all workers")
    weights: LossWeights = Field(default_factory=LossWeights)
    first_tokens: FirstTokensConfig = Field(default_factory=FirstTokensConfig)
    anchor_divergence: Divergence = Field("forward_kl", description="divergence of the anchor from the aligned model")
    recovery_divergence: Divergence = Field("forward_kl", description="divergence of recovery from the same")
    temperature: float = Field(1.0, gt=0, description="temperature of teacher and student alike in anchor and recovery")
    penalty: PenaltyConfig = Field(default_factory=PenaltyConfig)
    contrastive: ContrastiveSettings = Field(default_factory=ContrastiveSettings)
    constraint: ConstraintConfig = Field(
        default_factory=ConstraintConfig, description="holds KL(aligned || student) on anchor tokens under a budget"
    )

    depth_term = "recovery"
    validated_terms = ("anchor", "recovery")

    def loss_weights(self) -> dict[str, float]:
        """The weights of the run file."""
        return self.weights.model_dump()

    def loss_options(self) -> dict[str, Section]:
        """Settings of the three terms."""
        both = {"temperature": self.temperature, "contrastive": self.contrastive}
        return {
            "anchor": DivergenceSettings(divergence=self.anchor_divergence, **both),
            "recovery": DivergenceSettings(divergence=self.recovery_divergence, **both),
            "penalty": self.penalty,
        }

    def sequence(self, item: Item, feedback: Feedback) -> TrainSequence:
        """x and the aligned model's answer, or x, h up to the cut, and the aligned model's refusal."""
        return self._anchor(item) if isinstance(item, AnchorItem) else self._recovery(item, feedback)

    def _anchor(self, item: AnchorItem) -> TrainSequence:
        prompt, answer = item.sample.prompt_ids, item.sample.kept_ids
        first, weight = self.first_tokens.count, self.first_tokens.weight
        weights = None if weight == 1 else [weight if place < first else 1.0 for place in range(len(answer))]
        plain = TeacherContext(item.sample.plain_prompt_ids, answer)
        span = RowSpan("anchor", len(prompt), len(answer), plain, weights=weights)
        return TrainSequence(prompt + answer, (span,))

    def _recovery(self, item: RecoveryItem, feedback: Feedback) -> TrainSequence:
        sample, depth = item.sample, item.depth
        prompt, refusal = sample.prompt_ids, sample.refusal_ids
        spans = []
        if self.weights.penalty > 0 and depth > 0:
            along_h = TeacherContext(sample.teacher_prompt_ids, sample.harmful_ids)
            weights = self._by_depth(item, feedback)
            spans.append(RowSpan("penalty", len(prompt), depth, along_h, weights=weights))
        without_h = TeacherContext(sample.teacher_prompt_ids, refusal)
        spans.append(RowSpan("recovery", len(prompt) + depth, len(refusal), without_h))
        return TrainSequence(prompt + sample.harmful_ids[:depth] + refusal, tuple(spans), item.answer_depth)

    def _by_depth(self, item: RecoveryItem, feedback: Feedback) -> list[float] | None:
        """Weight of each row of h: as cuts, depth is counted from after a refusal prefix, which stands at depth 0."""
        if not self.penalty.follow_depth or not len(feedback.need_by_depth):
            return None
        prefix = item.sample.refusal_prefix_tokens
        return [feedback.need_by_depth[max(position - prefix, 0)] for position in range(item.depth)]

    def normalisers(self, sequences: Iterable[TrainSequence]) -> dict[str, float]:
        """Rows of each term; those of the anchor weighted, so that it stays a mean over tokens."""
        sequences = list(sequences)
        found = super().normalisers(sequences)
        anchors = [span.count for sequence in sequences for span in sequence.spans if span.term == "anchor"]
        if anchors:
            first = sum(min(count, self.first_tokens.count) for count in anchors)
            found["anchor"] += (self.first_tokens.weight - 1) * first
        return found

    @property
    def constrained(self) -> tuple[str, ConstraintConfig]:
        """The anchor, under `constraint`."""
        return "anchor", self.constraint

    @model_validator(mode="after")
    def _one_meaning(self) -> Completion:
        contrastive = self.contrastive.alpha > 0
        if contrastive and "reverse_kl" in (self.anchor_divergence, self.recovery_divergence):
            raise ValueError("method.contrastive excludes tokens, and reverse_kl to such a teacher is infinite")
        if self.constraint.kl_budget is None:
            return self
        if not 0 < self.weights.anchor <= self.constraint.max_weight:
            raise ValueError(
                "method.constraint.kl_budget moves method.weights.anchor up to method.constraint.max_weight: the "
                "weight must be positive and not above it"
            )
        if self.anchor_divergence != "forward_kl" or self.temperature != 1 or contrastive:
            raise ValueError(
                "method.constraint.kl_budget bounds KL(aligned || student), so it needs method.anchor_divergence "
                "forward_kl, method.temperature 1 and method.contrastive.alpha 0"
            )
        return self
