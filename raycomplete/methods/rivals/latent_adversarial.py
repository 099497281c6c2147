"""Latent adversarial training: refuse although an adversary pushes the inner states of the prompt towards compliance.

Source: Sheshadri et al., arXiv 2407.15549; its code, aengusl/latent-adversarial-training (`latent_at/utils.py`). A
perturbation d is added to the embeddings and to the output of the MLP of some layers at every token of x, ||d|| at most
epsilon a token, the same before h and before r. With away(z) the mean of -log(1 - p(z_t)), 0 where log p(z_t) < -5:

    adversary: d falls on 0.5 CE(h | x + d) + 0.5 away(r | x + d), a few steps of AdamW from 0
    student:   0.5 CE(r | x + d) + 0.5 away(h | x + d) + 1.5 CE(y | u), divided by the sum of the coefficients

Theirs besides (Llama-2-7B; layers 8, 16, 24, 30 of 32; epsilon 6; 16 inner steps at 0.05, 100 outer ones, batches of
16): `train: {lr: 2.0e-5, lora_rank: 64}`. With Llama-3-8B they take d on the answer too, KL to the start model with 0.1
in place of 1.5 CE (`retain = "retain_kl"` here), and rates of 0.001 and 8e-5. Refused under ZeRO-3, whose hooks follow
one forward pass a backward pass, and with gradient checkpointing, which would compute layers without the perturbation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import OwnTerm, RecoveryItem, RowSpan, StudentPass, TrainSequence, register
from raycomplete.methods.rivals.shared import RETAIN_KL, Rival, away, away_rows
from raycomplete.methods.suffix_adversary import changed_outputs, log_probs_of_rows
from raycomplete.runtime.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor


@register
class LatentAdversarial(Rival):
    """Refusals under an adversary that pushes inner states of the prompt towards compliance, and harmless answers."""

    name: Literal["latent_adversarial"] = "latent_adversarial"
    epsilon: float = Field(6.0, gt=0, description="largest norm of the perturbation of a token")
    inner_steps: int = Field(16, ge=1, description="steps of the adversary")

    inner_lr: ClassVar[float] = 5e-2
    layers: ClassVar[tuple[float, ...]] = (8 / 32, 16 / 32, 24 / 32, 30 / 32)  # as shares of the depth
    retain_weight: ClassVar[float] = 1.5  # where refusals and pushing away have 0.5 each
    recovery_sequences = 2
    perturbs_layers = True
    published = (("train.lr", 2e-05), ("train.lora_rank", 64), ("train.steps", 100))
    departures = (
        "the student moves once for each perturbation, not four times, and its optimizer is not reset",
        "only the prompt is perturbed",
    )
    terms = (
        OwnTerm("toward", "toward refusal", "-log p_s of refusals under the adversary", "nll"),
        OwnTerm("away", "away from h", "-log(1 - p_s) of h under the adversary", away_rows),
        RETAIN_KL,
    )

    @property
    def extra_passes(self) -> float:
        return float(self.inner_steps)

    def loss_weights(self) -> dict[str, float]:
        weights = {self.retain: self.retain_weight, "toward": 0.5, "away": 0.5}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def harmful(self, item: RecoveryItem) -> tuple[TrainSequence, ...]:
        prompt, h = item.sample.prompt_ids, item.sample.harmful_ids[item.sample.refusal_prefix_tokens :]
        both = (("toward", item.sample.refusal_ids), ("away", h))
        return tuple(TrainSequence(prompt + said, (RowSpan(term, len(prompt), len(said)),)) for term, said in both)

    def student_pass(self, lm: Any) -> StudentPass:
        import torch

        layers = getattr(lm.base_model, "layers", [])
        if not layers or not hasattr(layers[0], "mlp"):
            raise SetupError(f"latent_adversarial needs layers with an mlp, and {type(lm).__name__} has none.")
        places = sorted({min(int(share * len(layers)), len(layers) - 1) for share in self.layers})
        sites = [lm.get_input_embeddings(), *(layers[place].mlp for place in places)]

        def run(student: Any, batch: Any) -> Any:
            is_toward_N, is_away_N = (batch.term_N == batch.terms.index(name) for name in ("toward", "away"))
            if not is_toward_N.any():
                return student.total(student.states(batch).last_hidden_state, batch, {})
            position_P, place_P = shared_prompts(batch, is_toward_N, is_away_N)
            weight = lm.get_input_embeddings().weight
            zeros = partial(weight.new_zeros, (int(place_P.max()) + 1, weight.shape[1]), requires_grad=True)
            deltas = [zeros(dtype=torch.promote_types(weight.dtype, torch.float32)) for _ in sites]
            optimizer = torch.optim.AdamW(deltas, lr=self.inner_lr)

            def add(flat_NH: Tensor, delta: Tensor) -> Tensor:
                return flat_NH.index_add(0, position_P, delta[place_P].to(flat_NH.dtype))

            changes = [(site, partial(add, delta=delta)) for site, delta in zip(sites, deltas, strict=True)]
            with changed_outputs(changes):
                for _ in range(self.inner_steps):
                    log_p_N = log_probs_of_rows(student, batch)
                    loss = -0.5 * log_p_N[is_away_N].mean() + 0.5 * away(log_p_N[is_toward_N]).mean()
                    # Gradients of the perturbation alone: nothing reaches the student's own.
                    for delta, gradient in zip(deltas, torch.autograd.grad(loss, deltas), strict=True):
                        delta.grad = gradient
                    optimizer.step()
                    for values in (delta.data for delta in deltas):
                        values.mul_((self.epsilon / values.norm(dim=-1, keepdim=True)).clamp(max=1))
                return student.total(student.states(batch).last_hidden_state, batch, {})

        return run


def shared_prompts(batch: Any, *own: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of the prompt tokens of both sequences of each pair [P], and which perturbation each takes [P]."""
    import torch

    positions, places = [], []
    for is_own_N in own:
        place = 0  # sequences of an item follow each other: the first with refusal rows belongs to the first with h
        for sequence in batch.sequence_N[is_own_N].unique():
            first = batch.row_N[is_own_N & (batch.sequence_N == sequence)].min()
            own_T = torch.arange(int(batch.position_ids_BT.flatten()[first]) + 1, device=first.device)
            positions.append(first - len(own_T) + 1 + own_T)
            places.append(place + own_T)
            place += len(own_T)
    return torch.cat(positions), torch.cat(places)
