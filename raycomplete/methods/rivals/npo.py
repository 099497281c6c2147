"""Negative preference optimisation (NPO): compliant continuations as what is to be forgotten.

Source: Zhang et al., arXiv 2404.05868; its code, licong-lin/negative-preference-optimization (`TOFU/dataloader.py`):
-(2 / beta) mean log sigmoid(-beta (L_s(h) - L_a(h))), L the log-probability of all of h after x, plus a loss on what is
to be retained, cross-entropy or KL from the start model, with coefficients of 1. Unlike unlikelihood its gradient fades
where the student has left the start model: it is 2 p_s^beta / (p_s^beta + p_a^beta) times that of L_s.

Theirs besides: beta 0.1, batches of 16, 10 epochs, `train: {lr: 1.0e-5}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.data.samples import RecoverySample
from raycomplete.methods.registry import OwnTerm, RecoveryItem, RowSpan, TeacherContext, TrainSequence, register
from raycomplete.methods.rivals.shared import RETAIN_KL, Rival, of_token
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs


class NpoSettings(Section):
    """The term `npo`."""

    beta: float = 0.1


def log_ratio(rows: LogProbs, options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """log p_s - log p_a of the token that follows, which `npo_loss` sums over a sequence."""
    ratio_R = of_token(rows.student_NV, rows) - of_token(rows.aligned_NV, rows)
    return ratio_R, {"log_ratio": ratio_R}


def npo_loss(ratio_S: Tensor, options: NpoSettings) -> Tensor:
    """-(2 / beta) log sigmoid(-beta ratio) of whole sequences."""
    scaled_S = options.beta * ratio_S
    return 2 / options.beta * scaled_S.logaddexp(scaled_S.new_zeros(()))


NPO_TERM = OwnTerm(
    "npo",
    "NPO",
    "-(2 / beta) log sigmoid of -beta times the log-ratio of a compliant continuation to the start model",
    log_ratio,
    reads=("aligned",),
    metrics={"log_ratio": "log p_s - log p_a of the next token of a compliant continuation, nats"},
    options=NpoSettings,
    sequence_loss=npo_loss,
)


def forgotten(sample: RecoverySample, first: int) -> TrainSequence:
    """x and h, whose tokens from `first` on are rows of `npo`."""
    prompt, harmful = sample.prompt_ids, sample.harmful_ids
    span = RowSpan("npo", len(prompt) + first, len(harmful) - first, TeacherContext(prompt, harmful), first)
    return TrainSequence(prompt + harmful, (span,))


@register
class NPO(Rival):
    """Negative preference optimisation of compliant continuations, and harmless answers to retain."""

    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="how soon the gradient fades; near 0 it is gradient ascent")

    retain_weight: ClassVar[float] = 1.0
    published = (("train.lr", 1e-05),)
    departures = (
        "compliant answers are forgotten, not facts, and aligned's answers to harmless and borderline prompts retained",
    )
    per_sequence = frozenset({"npo"})
    terms = (NPO_TERM, RETAIN_KL)

    def loss_weights(self) -> dict[str, float]:
        return {self.retain: self.retain_weight, "npo": 1.0}

    def loss_options(self) -> dict[str, Section]:
        return {"npo": NpoSettings(beta=self.beta)}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        return (forgotten(item.sample, item.sample.refusal_prefix_tokens),)
