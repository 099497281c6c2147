"""A training method with a loss term of its own: unlikelihood training along compliant beginnings.

The student stays at the aligned model along the aligned model's own answers, and the tokens of harmful continuations
lose their probability wherever they stand. In the run file:

    plugins: [add_method.py]
    method: {name: turn_away, strength: 0.5}
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from raycomplete.losses import LogProbs, Term, TermRows
from raycomplete.losses import register as register_term
from raycomplete.methods import (
    AnchorItem,
    Item,
    Method,
    RowSpan,
    Section,
    TeacherContext,
    TrainSequence,
    register,
)


def turn_away(rows: LogProbs, options: Section) -> TermRows:
    """-log(1 - p_s) of the token that follows, with its gradient by autograd."""
    p_R = rows.student_NV.gather(1, rows.token_N[:, None])[:, 0].exp()
    return TermRows(-torch.log1p(-p_R.clamp(max=1 - 1e-6)), {"harmful_token_mass": p_R})


register_term(
    Term(
        name="turn_away",
        label="turn_away",
        description="-log(1 - p_s) along compliant beginnings, in nats a token",
        formula=turn_away,
        reads=(),  # neither aligned nor base
        metrics={"harmful_token_mass": "the student's probability of the next token of a harmful continuation"},
    )
)


@register
class TurnAway(Method):
    """Anchor on the aligned model's answers, unlikelihood on harmful continuations."""

    name: Literal["turn_away"] = Field("turn_away", description="which method")
    strength: float = Field(0.1, ge=0, description="weight of unlikelihood, where the anchor has 1")

    depth_term = "turn_away"  # with depth.schedule: adaptive, depths are drawn most where it is still high

    def loss_weights(self) -> dict[str, float]:
        """The two terms."""
        return {"anchor": 1.0, "turn_away": self.strength}

    def sequence(self, item: Item) -> TrainSequence:
        """A prompt with the aligned model's answer, or with a harmful continuation up to a drawn depth."""
        prompt = item.sample.prompt_ids
        if isinstance(item, AnchorItem):
            answer = item.sample.answer_ids
            read = TeacherContext(prompt, answer)
            return TrainSequence(prompt + answer, (RowSpan("anchor", len(prompt), len(answer), read),))
        harmful = item.sample.harmful_ids[: item.depth]
        return TrainSequence(prompt + harmful, (RowSpan("turn_away", len(prompt), item.depth),), item.answer_depth)
