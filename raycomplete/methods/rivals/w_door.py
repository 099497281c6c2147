"""Weighted dual-objective optimisation: DOOR with a weight on each refusal token from a reward model's log-ratio.

Source: Zhao et al., arXiv 2503.03710; its code, wicai24/DOOR-Alignment (`utils/loss.py`, types 11 and 12). The refusal
term of `door` becomes -sum w_t log p_s(r_t | x, h<k, r<t), with w_t = exp(+-(log p_a - log p_d) / tau) or
1 - sigmoid(+-(log p_d - log p_a) / tau), p_d a model that was preference-trained on the same pairs, p_a the start
model. In their code weights fall where the reward log p_d - log p_a rises (`sign = "code"`); the paper's sign is not
known to us, and `sign = "paper"` is our recollection: weights rise with the reward.

p_d is read in the place of base: give the student of an earlier run (of `door`, say) as `models.base`, and name the
writer of h in `rollout.harmful_from`. Attacks take base as their helper and prefills are its words, so evaluate the
student under a run file with the true base, or its rates cannot be compared with those of other methods. With the true
base as `models.base`, the log-ratio of base to aligned takes its place: what alignment did, turned round, which `sign`
turns back. A weight of `exp` is then unbounded where base never refuses: take `token_weights: sigmoid`.

Theirs besides: tau 1, alpha 0.2, beta 0.5, `train: {lr: 1.0e-5}`, p_d trained by DPO (type 9).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import OwnTerm, RecoveryItem, TeacherContext, TrainSequence, register
from raycomplete.methods.rivals.door import DOOR
from raycomplete.methods.rivals.npo import NPO_TERM
from raycomplete.methods.rivals.shared import of_token
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import LogProbs


class WeightedRefusalSettings(Section):
    """The term `weighted_refusal`."""

    tau: float = 1.0
    sign: Literal["code", "paper"] = "code"
    weights: Literal["exp", "sigmoid"] = "exp"


def weighted_refusal(rows: LogProbs, options: WeightedRefusalSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """-w_t log p_s of the token that follows, w_t from the log-ratio of the model in base's place to aligned."""
    student_R, aligned_R, other_R = (
        of_token(log_p, rows) for log_p in (rows.student_NV, rows.aligned_NV, rows.base_NV)
    )
    reward_R = (other_R - aligned_R) / options.tau * (1 if options.sign == "paper" else -1)
    weight_R = reward_R.exp() if options.weights == "exp" else reward_R.sigmoid()
    return -weight_R * student_R, {"refusal_weight": weight_R}


@register
class WDOOR(DOOR):
    """DOOR with weights on the tokens of refusals, from the log-ratio of the model in base's place to aligned."""

    name: Literal["w_door"] = "w_door"  # type: ignore[assignment]
    token_weights: Literal["exp", "sigmoid"] = Field("exp", description="how the log-ratio becomes a weight")

    tau: ClassVar[float] = 1.0  # temperature of the weights
    sign: ClassVar[Literal["code", "paper"]] = "code"
    departures = (  # type: ignore[assignment]
        *DOOR.departures,
        "tokens are rewarded by the model in base's place: by the true base, unless a run names a reward model there",
        "the harmful term is the paper's NPO, where their code has no reference and divides by the number of tokens",
    )
    per_sequence = frozenset({"nll", "weighted_refusal", "npo"})
    terms = (
        NPO_TERM,
        OwnTerm(
            "weighted_refusal",
            "weighted refusal",
            "-w_t log p_s of refusals after h, in nats",
            weighted_refusal,
            reads=("aligned", "base"),
            metrics={"refusal_weight": "w_t"},
            options=WeightedRefusalSettings,
        ),
    )

    def loss_weights(self) -> dict[str, float]:
        return {"nll": 1 - self.alpha, "weighted_refusal": self.alpha, "npo": self.alpha}

    def loss_options(self) -> dict[str, Section]:
        weighted = WeightedRefusalSettings(tau=self.tau, sign=self.sign, weights=self.token_weights)
        return super().loss_options() | {"weighted_refusal": weighted}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        """Those of DOOR; both frozen models read the refusal, too."""
        refusal, forgotten = super().harmful(item)
        prompt = item.sample.prompt_ids
        read = TeacherContext(prompt, refusal.token_ids[len(prompt) :])
        span = replace(refusal.spans[0], term="weighted_refusal", context=read, offset=refusal.depth)
        return replace(refusal, spans=(span,)), forgotten
