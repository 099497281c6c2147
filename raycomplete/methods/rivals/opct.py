"""On-policy consistency training: the student's own words after a led-on prompt, as aligned weighs them without it.

Source: arXiv 2605.21834, known to us by its abstract and secondary reports. y is sampled from p_s(. | x'), x' a wrapped
twin of x, and trained is the mean over tokens of KL(p_s(. | x', y<t) || p_a(. | x, y<t)), p_a the start model. Here x'
is x with h<D after it, and x in another form where `rollout.prompt_augmentation` says so; for a harmless prompt it is
that form, or x itself.

Reverse KL to a refusing model can end in short refusals; the harmless rollouts counteract that.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from raycomplete.losses.settings import Divergence, DivergenceSettings
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

_SAID = "divergence from aligned, which did not read h, along the student's words"


@register
class OPCT(Method):
    """On-policy consistency: the student's own words after h, as aligned weighs them without h."""

    name: Literal["opct"] = "opct"

    plain_fraction: ClassVar[float] = 0.25  # share of harmful rollouts after the prompt alone
    divergence: ClassVar[Divergence] = "reverse_kl"  # from aligned
    depth_term = "consistency"
    departures = (
        "an opened answer leads on, not another wording of the prompt",
        "rates, steps and code of the authors are not known to us",
    )
    terms = tuple(OwnTerm(name, name, _SAID, "anchor") for name in ("retain_kl", "consistency"))

    @property
    def rollout_groups(self) -> RolloutGroups:
        return RolloutGroups(1, self.plain_fraction)

    def loss_weights(self) -> dict[str, float]:
        return {"retain_kl": 1.0, "consistency": 1.0}

    def loss_options(self) -> dict[str, Section]:
        return dict.fromkeys(self.loss_weights(), DivergenceSettings(divergence=self.divergence))

    def sequence(self, item: Item) -> TrainSequence:
        """The words that the student read and wrote, beside those that it wrote after the plain prompt."""
        prompt = item.sample.prompt_ids
        if isinstance(item, AnchorItem):
            read = TeacherContext(item.sample.plain_prompt_ids, item.sample.answer_ids)
            span = RowSpan("retain_kl", len(prompt), len(read.response_ids), read)
            return TrainSequence(prompt + read.response_ids, () if item.sample.kind == "harmful" else (span,))
        led = prompt + item.sample.harmful_ids[: item.depth]
        read = TeacherContext(item.sample.teacher_prompt_ids, item.sample.refusal_ids)
        span = RowSpan("consistency", len(led), len(read.response_ids), read)
        return TrainSequence(led + read.response_ids, (span,), item.answer_depth or -1)
