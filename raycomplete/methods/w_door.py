"""Weighted dual-objective optimisation: DOOR with a weight on each refusal token from a reward model's log-ratio.

Source: Zhao et al., arXiv 2503.03710; its code, wicai24/DOOR-Alignment (`utils/loss.py`, types 11 and 12). The refusal
term of `door` becomes -sum w_t log p_s(r_t | x, h<k, r<t), with w_t = exp(+-(log p_a - log p_d) / tau) or
1 - sigmoid(+-(log p_d - log p_a) / tau), p_d a model that was preference-trained on the same pairs, p_a the start
model. In their code weights fall where the reward log p_d - log p_a rises (`sign: code`); the paper's sign is not known
to us, and `sign: paper` is our recollection: weights rise with the reward.

p_d is read in the place of base: give the student of an earlier run (of `door`, say) as `models.base`, and name the
writer of h in `rollout.harmful_from`. Attacks take base as their helper and prefills are its words, so evaluate the
student under a run file with the true base, or its rates cannot stand beside those of other methods. With the true
base as `models.base`, the log-ratio of base to aligned takes its place: what alignment did, turned round, which `sign`
turns back. A weight of `exp` is then unbounded where base never refuses: take `token_weights: sigmoid`.

Theirs besides: tau 1, alpha 0.2, beta 0.5, `train: {lr: 1.0e-5}`, p_d trained by DPO (type 9).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raycomplete.methods.door import DOOR
from raycomplete.methods.npo import NpoSettings, npo_term
from raycomplete.methods.registry import RecoveryItem, TeacherContext, TrainSequence, register
from raycomplete.runtime.section import Section

if TYPE_CHECKING:
    from raycomplete.losses.terms import LogProbs, Term
    from raycomplete.losses.torch_rows import TermRows


class WeightedRefusalSettings(Section):
    """The term `weighted_refusal`."""

    tau: float = 1.0
    sign: Literal["code", "paper"] = "code"
    weights: Literal["exp", "sigmoid"] = "exp"


def weighted_refusal(rows: LogProbs, options: WeightedRefusalSettings) -> TermRows:
    """-w_t log p_s of the token that follows, w_t from the log-ratio of the model in base's place to aligned."""
    from raycomplete.losses.torch_rows import TermRows

    token_R1 = rows.token_N[:, None]
    student_R, aligned_R, other_R = (
        log_p_RV.gather(1, token_R1)[:, 0] for log_p_RV in (rows.student_NV, rows.aligned_NV, rows.base_NV)
    )
    reward_R = (other_R - aligned_R) / options.tau * (1 if options.sign == "paper" else -1)
    weight_R = reward_R.exp() if options.weights == "exp" else reward_R.sigmoid()
    return TermRows(-weight_R * student_R, {"refusal_weight": weight_R})


@register
class WDOOR(DOOR):
    """DOOR with weights on the tokens of refusals, from the log-ratio of the model in base's place to aligned."""

    name: Literal["w_door"] = Field("w_door", description="which method")  # type: ignore[assignment]
    tau: float = Field(1.0, gt=0, description="temperature of the weights")
    sign: Literal["code", "paper"] = Field(
        "code", description="weights fall where the log-ratio rises (the authors' code), or rise with it"
    )
    token_weights: Literal["exp", "sigmoid"] = Field("exp", description="how the log-ratio becomes a weight")

    departures = (  # type: ignore[assignment]
        *DOOR.departures,
        "tokens are rewarded by the model in base's place: by the true base, unless a run names a reward model there",
        "the harmful term is the paper's NPO, where their code has no reference and divides by the number of tokens",
    )
    per_sequence = frozenset({"nll", "weighted_refusal", "npo"})

    def own_terms(self) -> tuple[Term, ...]:
        """NPO and the weighted refusal."""
        from raycomplete.losses.terms import Term

        weighted = Term(
            "weighted_refusal",
            "weighted refusal",
            "-w_t log p_s of refusals after h, in nats",
            weighted_refusal,
            reads=("aligned", "base"),
            metrics={"refusal_weight": "w_t"},
            options=WeightedRefusalSettings,
        )
        return npo_term(), weighted

    def loss_weights(self) -> dict[str, float]:
        """Harmless answers, weighted refusals and compliant continuations."""
        return {"nll": 1 - self.alpha, "weighted_refusal": self.alpha, "npo": self.alpha}

    def loss_options(self) -> dict[str, Section]:
        """Passes `beta` to the term of NPO, and their settings to the weights of refusals."""
        weighted = WeightedRefusalSettings(tau=self.tau, sign=self.sign, weights=self.token_weights)
        return {"npo": NpoSettings(beta=self.beta), "weighted_refusal": weighted}

    def refusal(self, item: RecoveryItem, cut: int) -> TrainSequence:
        """x, h<k and r, which both frozen models read as well."""
        plain = super().refusal(item, cut)
        start = len(item.sample.prompt_ids)
        read = TeacherContext(item.sample.prompt_ids, plain.token_ids[start:])
        return replace(plain, spans=(replace(plain.spans[0], term="weighted_refusal", context=read, offset=cut),))
