"""Deep alignment by distillation from a hybrid teacher: anchor, recovery and push-forward, and what may be added.

anchor: along the aligned model's own answers to all prompts, the student stays at the aligned model.
recovery: after x and a compliant beginning h<D, the student says what aligned says after x alone. The teacher does not
see h: it reads x, then the refusal.
push-forward: at every token of h after the first the student says what aligned says at the start of its answer to x, as
if it had not been led on. At a temperature of 4 the unlikely tokens count as well: an attack that picks among the
likeliest tokens of every step exploits those, and at 1 it still succeeds.
Off by default:
opening: to a harmful prompt the student says the first token of a refusal by aligned, also where aligned itself wavers:
sampling finds the answer among a few draws otherwise. The price may be refusals of harmless prompts that look harmful.
suffix_adversary: some harmful prompts have a suffix, which an adversary moves before the student trains behind it.
penalty: along h, tokens that base says more than aligned does at the start of its answer lose their probability.

The formulas are ours, not those of arXiv 2511.12155, which is known to us by its abstract and secondary reports.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raycomplete.losses.settings import ContrastiveSettings, DivergenceSettings, PushForwardSettings
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    Method,
    RecoveryItem,
    RowSpan,
    StudentPass,
    Suffix,
    TeacherContext,
    TrainSequence,
    register,
)
from raycomplete.methods.suffix_adversary import SuffixAdversaryConfig, adversarial_pass
from raycomplete.runtime.section import Section

FIRST_TOKENS = 8  # of an anchor answer: they decide whether it becomes an answer or a refusal


class LossWeights(Section):
    """Weights of the terms of the loss."""

    anchor: float = Field(1.0, ge=0, description="keeps the student at the aligned model along aligned's own answers")
    recovery: float = Field(1.0, ge=0, description="teaches aligned's refusal after a harmful continuation")
    push_forward: float = Field(
        1.0, ge=0, description="teaches the start of that refusal at every token of the continuation"
    )
    opening: float = Field(0.0, ge=0, description="teaches the first token of aligned's refusal, wherever there is one")
    penalty: float = Field(
        0.0, ge=0, description="takes probability from base-favored tokens along the harmful continuation"
    )


@register
class Completion(Method):
    """Anchor, recovery, push-forward, opening and penalty. A subclass may change `loss_options`."""

    name: Literal["completion"] = Field("completion", description="which method")
    weights: LossWeights = Field(default_factory=LossWeights)
    first_token_weight: float = Field(
        1.0,
        ge=1,
        description=f"weight of each of the first {FIRST_TOKENS} tokens of an anchor answer, where every later token "
        "has 1; the sum stays 1",
    )
    push_forward_temperature: float = Field(
        4.0, gt=0, description="T of push-forward, which divides the logits of both models: above 1 the tail counts"
    )
    contrastive_alpha: float = Field(
        0.0, ge=0, description="strength of the contrastive teacher p_a (p_a / p_b)^alpha of anchor and recovery"
    )
    suffix_adversary: SuffixAdversaryConfig = Field(default_factory=SuffixAdversaryConfig)

    depth_term = "recovery"

    def loss_weights(self) -> dict[str, float]:
        return self.weights.model_dump()

    def loss_options(self) -> dict[str, Section]:
        distilled = DivergenceSettings(contrastive=ContrastiveSettings(alpha=self.contrastive_alpha))
        return {
            "anchor": distilled,
            "recovery": distilled,
            "push_forward": PushForwardSettings(temperature=self.push_forward_temperature),
        }

    @property
    def moves_suffixes(self) -> bool:
        return self.suffix_adversary.steps > 0

    def student_pass(self, lm: Any) -> StudentPass | None:
        return adversarial_pass(lm, self.suffix_adversary, "push_forward") if self.moves_suffixes else None

    def sequence(self, item: Item) -> TrainSequence:
        """x and the aligned model's answer, or x, h up to the cut, and the aligned model's refusal."""
        return self._anchor(item) if isinstance(item, AnchorItem) else self._recovery(item)

    def _anchor(self, item: AnchorItem) -> TrainSequence:
        prompt, answer = item.sample.prompt_ids, item.sample.kept_ids
        first = self.first_token_weight
        weights = None if first == 1 else [first if place < FIRST_TOKENS else 1.0 for place in range(len(answer))]
        plain = TeacherContext(item.sample.plain_prompt_ids, answer)
        # Position 0 of a harmful prompt is the opening's: the anchor would hold it where aligned wavers.
        start = int(item.sample.kind == "harmful" and self.weights.opening > 0)
        weights = None if weights is None else weights[start:]
        span = RowSpan("anchor", len(prompt) + start, len(answer) - start, plain, offset=start, weights=weights)
        return TrainSequence(prompt + answer, (span,))

    def _recovery(self, item: RecoveryItem) -> TrainSequence:
        sample, depth = item.sample, item.depth
        prompt, refusal = sample.prompt_ids, sample.refusal_ids
        along_h = TeacherContext(sample.teacher_prompt_ids, sample.harmful_ids)
        without_h = TeacherContext(sample.teacher_prompt_ids, refusal)
        suffix = None
        if self.moves_suffixes and sample.can_move_suffix:
            suffix = Suffix(*sample.suffix, seed=item.draws().getrandbits(63))
        # Position 0 is the anchor's or the opening's, but behind a suffix that is moved, where no anchor stands. An
        # imitated refusal is no part of the answer.
        first = sample.refusal_prefix_tokens or (0 if suffix else 1)
        spans = [
            RowSpan(term, len(prompt) + first, depth - first, along_h, offset=first, target=(without_h, 0))
            for term, weight in (("push_forward", self.weights.push_forward), ("penalty", self.weights.penalty))
            if weight > 0 and depth > first
        ]
        if self.weights.opening > 0:
            first_ids = refusal[:1] if item.first_id is None else (item.first_id,)
            spans.append(RowSpan("opening", len(prompt), 1, token_ids=first_ids))
        spans.append(RowSpan("recovery", len(prompt) + depth, len(refusal), without_h))
        token_ids = prompt + sample.harmful_ids[:depth] + refusal
        return TrainSequence(token_ids, tuple(spans), item.answer_depth, suffix)

    @model_validator(mode="after")
    def _one_meaning(self) -> Completion:
        if self.moves_suffixes and not self.weights.push_forward:
            raise ValueError("method.suffix_adversary moves what push_forward trains, and its weight is 0")
        return self
