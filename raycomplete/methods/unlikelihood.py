"""Unlikelihood training against compliant continuations, with cross-entropy on harmless answers.

Source: Welleck et al., "Neural Text Generation With Unlikelihood Training" (arXiv 1908.04319), known to us by its
abstract: -sum log(1 - p_s(h_t)). The rates of NPO (`raycomplete.methods.npo`) are a fair start. Nothing says what the
student should say in place of h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    RowSpan,
    TrainSequence,
    harmless_answer,
    register,
)

if TYPE_CHECKING:
    from raycomplete.losses.terms import LogProbs, Term
    from raycomplete.losses.torch_rows import TermRows


def unlikelihood(rows: LogProbs, options: Any) -> TermRows:
    """-log(1 - p_s) of the token that follows; 1 - p_s is summed over all others, and so keeps a gradient near 0."""
    from raycomplete.losses.torch_rows import TermRows

    token_R1 = rows.token_N[:, None]
    others_R = rows.student_NV.scatter(1, token_R1, float("-inf")).logsumexp(dim=1)
    return TermRows(-others_R, {"harmful_mass": rows.student_NV.gather(1, token_R1)[:, 0].exp()})


@register
class Unlikelihood(Method):
    """Unlikelihood of compliant continuations, and cross-entropy of aligned's harmless answers."""

    name: Literal["unlikelihood"] = Field("unlikelihood", description="which method")
    recovery_batch_size: int = Field(16, ge=1, description="compliant continuations of a step, over all workers")
    harmful_weight: float = Field(1.0, ge=0, description="weight of unlikelihood, where the harmless answers have 1")
    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    departures = (
        "a safety defence without authors whose settings could be taken: weights of 1 and means over tokens are ours",
    )

    def own_terms(self) -> tuple[Term, ...]:
        """Unlikelihood."""
        from raycomplete.losses.terms import Term

        return (
            Term(
                "unlikelihood",
                "unlikelihood",
                "-log(1 - p_s) along compliant continuations, in nats a token",
                unlikelihood,
                reads=(),
                metrics={"harmful_mass": "the student's probability of the next token of a compliant continuation"},
            ),
        )

    def loss_weights(self) -> dict[str, float]:
        """Harmless answers and compliant continuations."""
        return {"nll": 1.0, "unlikelihood": self.harmful_weight}

    def sequence(self, item: Item) -> TrainSequence:
        """A harmless prompt and its answer, or x and all of h."""
        if isinstance(item, AnchorItem):
            return harmless_answer(item, "nll")
        prompt, harmful = item.sample.prompt_ids, item.sample.harmful_ids
        first = item.sample.refusal_prefix_tokens
        span = RowSpan("unlikelihood", len(prompt) + first, len(harmful) - first)
        return TrainSequence(prompt + harmful, (span,), len(harmful) - first)
