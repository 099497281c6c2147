"""Dual-objective optimisation: say the refusal after any cut of h, and forget the rest of h.

Source: Zhao et al., arXiv 2503.03710; its code, wicai24/DOOR-Alignment (`utils/loss.py`, type 10). Sums over tokens,
means over sequences: alpha [-L_s(r | x, h<k) - (2 / beta) log sigmoid(-beta (L_s(h>=k | x, h<k) - L_a(the same)))] +
(1 - alpha) [-L_s(y | u)], with h cut at k once for each pair (x, h, r): k is 0 in half of them, else uniform.

Theirs besides: alpha 0.2, beta 0.5, k up to 100, 400 pairs, batches of 2, 2000 steps, `train: {lr: 1.0e-5}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raycomplete.methods.npo import NpoSettings, forgotten, npo_term
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
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from raycomplete.losses.terms import Term


@register
class DOOR(Method):
    """Refusals after any cut of compliant continuations, NPO of what follows the cut, and harmless answers."""

    name: Literal["door"] = Field("door", description="which method")
    recovery_batch_size: int = Field(
        16, ge=1, description="harmful prompts of a step, over all workers; each gives two sequences"
    )
    alpha: float = Field(
        0.2, ge=0, le=1, description="weight of both terms of harmful prompts; harmless ones have the rest"
    )
    beta: float = Field(0.5, gt=0, description="how soon the gradient of NPO fades")
    plain_fraction: float = Field(0.5, ge=0, le=1, description="share of pairs that are cut at 0")
    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    recovery_sequences = 2
    published = (("train.lr", 1e-05), ("train.steps", 2000))
    departures = (
        "their training system prompt, which tells the model to follow users' instructions, is not used",
        "harmless answers are aligned's own, not Alpaca's",
        "by default batches have 16 pairs and 16 harmless answers, not 2",
    )
    per_sequence = frozenset({"nll", "refusal", "npo"})

    def own_terms(self) -> tuple[Term, ...]:
        """NPO, and the cross-entropy of refusals under a name and weight of its own."""
        from raycomplete.losses.terms import Term, nll

        return npo_term(), Term("refusal", "refusal", "-log p_s of refusals after h, in nats", nll, reads=())

    def loss_weights(self) -> dict[str, float]:
        """Harmless answers, refusals and compliant continuations."""
        return {"nll": 1 - self.alpha, "refusal": self.alpha, "npo": self.alpha}

    def loss_options(self) -> dict[str, Section]:
        """Passes `beta` to the term of NPO."""
        return {"npo": NpoSettings(beta=self.beta)}

    def sequences(self, item: Item) -> tuple[TrainSequence, ...]:
        """A harmless prompt and its answer; or x, h<k and r, and x and h."""
        if isinstance(item, AnchorItem):
            return (harmless_answer(item, "nll"),)
        sample = item.sample
        cut = item.redrawn_cut(self.plain_fraction, once=True, spare=1)  # something is left to forget
        return self.refusal(item, cut), forgotten(sample.prompt_ids, sample.harmful_ids, cut)

    def refusal(self, item: RecoveryItem, cut: int) -> TrainSequence:
        """x, h<k and r, whose tokens are rows of `refusal`."""
        prompt, refusal = item.sample.prompt_ids, item.sample.refusal_ids
        span = RowSpan("refusal", len(prompt) + cut, len(refusal))
        return TrainSequence(prompt + item.sample.harmful_ids[:cut] + refusal, (span,), cut)
