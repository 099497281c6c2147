"""Negative preference optimisation (NPO): compliant continuations as what is to be forgotten.

Source: Zhang et al., arXiv 2404.05868; its code, licong-lin/negative-preference-optimization (`TOFU/dataloader.py`):
-(2 / beta) mean log sigmoid(-beta (L_s(h) - L_a(h))), L the log-probability of all of h after x, plus a loss on what is
to be retained, cross-entropy or KL from the start model, with coefficients of 1. Unlike unlikelihood its gradient fades
where the student has left the start model: it is 2 p_s^beta / (p_s^beta + p_a^beta) times that of L_s.

Theirs besides: beta 0.1, batches of 16, 10 epochs, `train: {lr: 1.0e-5}`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    RowSpan,
    TeacherContext,
    TrainSequence,
    harmless_answer,
    register,
)
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs, Term
    from raycomplete.losses.torch_rows import TermRows


class NpoSettings(Section):
    """The term `npo`."""

    beta: float = 0.1


def log_ratio(rows: LogProbs, options: Any) -> TermRows:
    """log p_s - log p_a of the token that follows, which `npo_loss` sums over a sequence."""
    from raycomplete.losses.torch_rows import TermRows

    token_R1 = rows.token_N[:, None]
    ratio_R = (rows.student_NV.gather(1, token_R1) - rows.aligned_NV.gather(1, token_R1))[:, 0]
    return TermRows(ratio_R, {"log_ratio": ratio_R})


def npo_loss(ratio_S: Tensor, options: NpoSettings) -> Tensor:
    """-(2 / beta) log sigmoid(-beta ratio) of whole sequences."""
    scaled_S = options.beta * ratio_S
    return 2 / options.beta * scaled_S.logaddexp(scaled_S.new_zeros(()))


def npo_term() -> Term:
    """The term `npo`, for methods that use it."""
    from raycomplete.losses.terms import Term

    return Term(
        "npo",
        "NPO",
        "-(2 / beta) log sigmoid of -beta times the log-ratio of a compliant continuation to the start model",
        log_ratio,
        metrics={"log_ratio": "log p_s - log p_a of the next token of a compliant continuation, nats"},
        options=NpoSettings,
        sequence_loss=npo_loss,
    )


@register
class NPO(Method):
    """Negative preference optimisation of compliant continuations, and harmless answers to retain."""

    name: Literal["npo"] = Field("npo", description="which method")
    recovery_batch_size: int = Field(16, ge=1, description="compliant continuations of a step, over all workers")
    beta: float = Field(0.1, gt=0, description="how soon the gradient fades; near 0 it is gradient ascent")
    retain: Literal["nll", "retain_kl"] = Field(
        "nll", description="cross-entropy of aligned's harmless answers, or KL from aligned along them"
    )
    retain_weight: float = Field(1.0, ge=0, description="weight of that")
    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    published = (("train.lr", 1e-05),)
    departures = (
        "compliant answers are forgotten, not facts, and aligned's answers to harmless and borderline prompts retained",
    )
    per_sequence = frozenset({"npo"})

    def own_terms(self) -> tuple[Term, ...]:
        """NPO, and the anchor under a name that no measurement steers."""
        from raycomplete.losses.terms import get

        return npo_term(), replace(get("anchor"), name="retain_kl", label="retain")

    def loss_weights(self) -> dict[str, float]:
        """Retains answers and forgets h."""
        return {self.retain: self.retain_weight, "npo": 1.0}

    def loss_options(self) -> dict[str, Section]:
        """Passes `beta` to the term of NPO."""
        return {"npo": NpoSettings(beta=self.beta)}

    def sequence(self, item: Item) -> TrainSequence:
        """A harmless prompt and its answer, or x and all of h."""
        if isinstance(item, AnchorItem):
            return harmless_answer(item, self.retain, is_read=self.retain == "retain_kl")
        return forgotten(item.sample.prompt_ids, item.sample.harmful_ids, item.sample.refusal_prefix_tokens)


def forgotten(prompt_ids: tuple[int, ...], harmful_ids: tuple[int, ...], first: int) -> TrainSequence:
    """x and h, whose tokens from `first` on are rows of `npo`."""
    span = RowSpan(
        "npo", len(prompt_ids) + first, len(harmful_ids) - first, TeacherContext(prompt_ids, harmful_ids), first
    )
    return TrainSequence(prompt_ids + harmful_ids, (span,))
