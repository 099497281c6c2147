"""On-policy consistency training: the student's own words after a led-on prompt, as aligned weighs them without it.

Source: arXiv 2605.21834, known to us by its abstract and secondary reports. y is sampled from p_s(. | x'), x' a wrapped
twin of x, and trained is the mean over tokens of KL(p_s(. | x', y<t) || p_a(. | x, y<t)), p_a the start model. Here x'
is x with h<D after it, and x in another form where `rollout.prompt_augmentation` says so; for a harmless prompt it is
that form, or x itself.

Reverse KL to a refusing model can end in short refusals; the harmless rollouts stand against that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raycomplete.losses.settings import Divergence, DivergenceSettings
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    Method,
    RolloutGroups,
    RowSpan,
    TeacherContext,
    TrainSequence,
    register,
)
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from raycomplete.losses.terms import Term


@register
class OPCT(Method):
    """On-policy consistency: the student's own words after h, as aligned weighs them without h."""

    name: Literal["opct"] = Field("opct", description="which method")
    recovery_batch_size: int = Field(16, ge=1, description="rollouts of harmful prompts of a step, over all workers")
    plain_fraction: float = Field(0.25, ge=0, le=1, description="share of harmful rollouts after the prompt alone")
    divergence: Divergence = Field("reverse_kl", description="direction of the divergence from aligned")

    depth_term = "consistency"
    departures = (
        "an opened answer leads on, not another wording of the prompt",
        "rates, steps and code of the authors are not known to us",
    )

    @property
    def rollout_groups(self) -> RolloutGroups:
        """Every rollout by itself."""
        return RolloutGroups(1, self.plain_fraction)

    def own_terms(self) -> tuple[Term, ...]:
        """The divergence, on rollouts of both kinds of prompts."""
        from raycomplete.losses.terms import get

        said = "divergence from aligned, which did not read h, along the student's words"
        names = ("retain_kl", "consistency")
        return tuple(replace(get("anchor"), name=name, label=name, description=said) for name in names)

    def loss_weights(self) -> dict[str, float]:
        """Weighs harmful and harmless rollouts alike."""
        return {"retain_kl": 1.0, "consistency": 1.0}

    def loss_options(self) -> dict[str, Section]:
        """Passes the chosen divergence to both terms."""
        return dict.fromkeys(self.loss_weights(), DivergenceSettings(divergence=self.divergence))

    def sequence(self, item: Item) -> TrainSequence:
        """The words that the student read and wrote, beside those that it wrote after the plain prompt."""
        sample = item.sample
        if isinstance(item, AnchorItem):
            read = TeacherContext(item.sample.plain_prompt_ids, item.sample.answer_ids)
            token_ids = sample.prompt_ids + read.response_ids
            span = RowSpan("retain_kl", len(sample.prompt_ids), len(read.response_ids), read)
            return TrainSequence(token_ids, () if item.sample.kind == "harmful" else (span,))
        led = sample.prompt_ids + item.sample.harmful_ids[: item.depth]
        read = TeacherContext(item.sample.teacher_prompt_ids, item.sample.refusal_ids)
        span = RowSpan("consistency", len(led), len(read.response_ids), read)
        return TrainSequence(led + read.response_ids, (span,), item.answer_depth or -1)
