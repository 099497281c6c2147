"""Dual-objective optimisation: say the refusal after any cut of h, and forget the rest of h.

Source: Zhao et al., arXiv 2503.03710; its code, wicai24/DOOR-Alignment (`utils/loss.py`, type 10). Sums over tokens,
means over sequences: alpha [-L_s(r | x, h<k) - (2 / beta) log sigmoid(-beta (L_s(h>=k | x, h<k) - L_a(the same)))] +
(1 - alpha) [-L_s(y | u)], with h cut at k once for each pair (x, h, r): k is 0 in half of them, else uniform.

Theirs besides: alpha 0.2, beta 0.5, k up to 100, 400 pairs, batches of 2, 2000 steps, `train: {lr: 1.0e-5}`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import OwnTerm, RecoveryItem, TrainSequence, register
from raycomplete.methods.rivals.npo import NPO_TERM, NpoSettings, forgotten
from raycomplete.methods.rivals.shared import Rival, refusal_after
from raycomplete.runtime.section import Section


@register
class DOOR(Rival):
    """Refusals after any cut of compliant continuations, NPO of what follows the cut, and harmless answers."""

    name: Literal["door"] = "door"
    alpha: float = Field(
        0.2, ge=0, le=1, description="weight of both terms of harmful prompts; harmless ones have the rest"
    )

    beta: ClassVar[float] = 0.5  # how soon the gradient of NPO fades
    plain_fraction: ClassVar[float] = 0.5  # share of pairs that are cut at 0
    recovery_sequences = 2
    published = (("train.lr", 1e-05), ("train.steps", 2000))
    departures = (
        "their training system prompt, which tells the model to follow users' instructions, is not used",
        "harmless answers are aligned's own, not Alpaca's",
        "by default batches have 16 pairs and 16 harmless answers, not 2",
    )
    per_sequence = frozenset({"nll", "refusal", "npo"})
    terms = (NPO_TERM, OwnTerm("refusal", "refusal", "-log p_s of refusals after h, in nats", "nll"))

    def loss_weights(self) -> dict[str, float]:
        return {"nll": 1 - self.alpha, "refusal": self.alpha, "npo": self.alpha}

    def loss_options(self) -> dict[str, Section]:
        return {"npo": NpoSettings(beta=self.beta)}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        """x, h<k and r; and x and h."""
        cut = item.redrawn_cut(self.plain_fraction, once=True, spare=1)  # something is left to forget
        return refusal_after(item, cut, "refusal"), forgotten(item.sample, cut)
