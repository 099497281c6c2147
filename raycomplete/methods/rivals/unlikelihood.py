"""Unlikelihood training against compliant continuations, with cross-entropy on harmless answers.

Source: Welleck et al., "Neural Text Generation With Unlikelihood Training" (arXiv 1908.04319), known to us by its
abstract: -sum log(1 - p_s(h_t)). The rates of NPO (`raycomplete.methods.rivals.npo`) are a fair start. Nothing says
what the student should say in place of h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raycomplete.methods.registry import OwnTerm, RecoveryItem, RowSpan, TrainSequence, register
from raycomplete.methods.rivals.shared import Rival, of_token, unlikely

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs


def unlikelihood(rows: LogProbs, options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """-log(1 - p_s) of the token that follows."""
    return unlikely(rows), {"harmful_mass": of_token(rows.student_NV, rows).exp()}


@register
class Unlikelihood(Rival):
    """Unlikelihood of compliant continuations, and cross-entropy of aligned's harmless answers."""

    name: Literal["unlikelihood"] = "unlikelihood"

    harmful_weight: ClassVar[float] = 1.0  # where the harmless answers have 1
    departures = (
        "a safety defence without authors whose settings could be taken: weights of 1 and means over tokens are ours",
    )
    terms = (
        OwnTerm(
            "unlikelihood",
            "unlikelihood",
            "-log(1 - p_s) along compliant continuations, in nats a token",
            unlikelihood,
            metrics={"harmful_mass": "the student's probability of the next token of a compliant continuation"},
        ),
    )

    def loss_weights(self) -> dict[str, float]:
        return {"nll": 1.0, "unlikelihood": self.harmful_weight}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        """x and all of h."""
        prompt, harmful = item.sample.prompt_ids, item.sample.harmful_ids
        first = item.sample.refusal_prefix_tokens
        span = RowSpan("unlikelihood", len(prompt) + first, len(harmful) - first)
        return (TrainSequence(prompt + harmful, (span,), len(harmful) - first),)
