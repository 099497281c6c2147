"""Parts that several rivals share: harmless answers to retain, terms, and sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    OwnTerm,
    RecoveryItem,
    RowSpan,
    TrainSequence,
    harmless_answer,
)

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs

# The anchor's formula under a name that no measurement steers.
RETAIN_KL = OwnTerm("retain_kl", "retain", "divergence from aligned along its harmless answers, in nats", "anchor")

_FORGOTTEN = -5.0  # log-probability below which nothing is pushed away any more


class Rival(Method):
    """A method that trains aligned's harmless answers, and draws its cuts of h itself."""

    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    retain: ClassVar[Literal["nll", "retain_kl"]] = "nll"  # cross-entropy of harmless answers, or KL from aligned
    terms: ClassVar[tuple[OwnTerm, ...]] = (RETAIN_KL,)

    def sequences(self, item: Item) -> tuple[TrainSequence, ...]:
        """A harmless prompt and its answer, or what the method trains of a harmful one."""
        if isinstance(item, AnchorItem):
            return (harmless_answer(item, self.retain, is_read=self.retain == "retain_kl"),)
        return self.harmful(item)

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        """The sequences of a harmful prompt."""
        raise NotImplementedError


def of_token(log_p_NV: Tensor, rows: LogProbs) -> Tensor:
    """The log-probability of the token that follows each row [R]."""
    return log_p_NV.gather(1, rows.token_N[:, None])[:, 0]


def unlikely(rows: LogProbs, options: Any = None) -> Tensor:
    """-log(1 - p_s) of the token that follows [R]; 1 - p_s sums all others, and so keeps a gradient near 0."""
    return -rows.student_NV.scatter(1, rows.token_N[:, None], float("-inf")).logsumexp(dim=1)


def away(log_p_R: Tensor) -> Tensor:
    """-log(1 - p) of tokens [R], 0 where they are unlikely already."""
    loss_R = -(-log_p_R.clamp(max=-1e-6).exp()).log1p()
    return loss_R.where(log_p_R >= _FORGOTTEN, loss_R.new_zeros(()))


def away_rows(rows: LogProbs, options: Any) -> Tensor:
    """`away` of the token that follows, with a gradient near 0 too."""
    return unlikely(rows).where(of_token(rows.student_NV, rows) >= _FORGOTTEN, 0.0)


def refusal_after(item: RecoveryItem, cut: int, term: str) -> TrainSequence:
    """x, h<D and the refusal, whose tokens are rows of a term."""
    prompt, refusal = item.sample.prompt_ids, item.sample.refusal_ids
    span = RowSpan(term, len(prompt) + cut, len(refusal))
    return TrainSequence(prompt + item.sample.harmful_ids[:cut] + refusal, (span,), cut)
