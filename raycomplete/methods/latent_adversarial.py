"""Latent adversarial training: refuse although an adversary pushes the inner states of the prompt towards compliance.

Source: Sheshadri et al., arXiv 2407.15549; its code, aengusl/latent-adversarial-training (`latent_at/utils.py`,
`notebooks/jailbreaks.ipynb`). To the embeddings and to the output of the MLP of some layers a perturbation d is added
at every token of x, ||d|| at most epsilon a token, the same before h and before r. With away(z) the mean of
-log(1 - p(z_t)), 0 where log p(z_t) < -5:

    adversary: d falls on 0.5 CE(h | x + d) + 0.5 away(r | x + d), a few steps of AdamW from 0
    student:   0.5 CE(r | x + d) + 0.5 away(h | x + d) + 1.5 CE(y | u), divided by the sum of the coefficients

Theirs besides (Llama-2-7B; layers 8, 16, 24, 30 of 32; epsilon 6; 16 inner steps at 0.05, 100 outer ones, batches of
16): `train: {lr: 2.0e-5, lora_rank: 64}`. With Llama-3-8B they take d on the answer too, KL to the start model with 0.1
in place of 1.5 CE (`retain: retain_kl` here), and rates of 0.001 and 8e-5. A step costs as many forward and backward
passes more as the adversary has steps. Refused under ZeRO-3, whose hooks follow one forward pass a backward pass, and
with gradient checkpointing, which would compute layers again without the perturbation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    RowSpan,
    StudentPass,
    TrainSequence,
    harmless_answer,
    register,
)
from raycomplete.runtime.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raycomplete.losses.terms import LogProbs, Term
    from raycomplete.losses.torch_rows import TermRows

_FORGOTTEN = -5.0  # log-probability below which nothing is pushed away any more


def away(log_p_R: Tensor) -> Tensor:
    """-log(1 - p) of tokens [R], 0 where they are unlikely already."""
    loss_R = -(-log_p_R.clamp(max=-1e-6).exp()).log1p()
    return loss_R.where(log_p_R >= _FORGOTTEN, loss_R.new_zeros(()))


def away_rows(rows: LogProbs, options: Any) -> TermRows:
    """`away` of the token that follows; 1 - p is summed over all others, and so keeps a gradient near 0."""
    from raycomplete.losses.torch_rows import TermRows

    token_R1 = rows.token_N[:, None]
    log_p_R = rows.student_NV.gather(1, token_R1)[:, 0]
    loss_R = -rows.student_NV.scatter(1, token_R1, float("-inf")).logsumexp(dim=1)
    return TermRows(loss_R.where(log_p_R >= _FORGOTTEN, loss_R.new_zeros(())))


@register
class LatentAdversarial(Method):
    """Refusals under an adversary who pushes inner states of the prompt towards compliance, and harmless answers."""

    name: Literal["latent_adversarial"] = Field("latent_adversarial", description="which method")
    recovery_batch_size: int = Field(
        16, ge=1, description="harmful prompts of a step, over all workers; each gives two sequences"
    )
    epsilon: float = Field(6.0, gt=0, description="largest norm of the perturbation of a token")
    inner_steps: int = Field(16, ge=1, description="steps of the adversary")
    inner_lr: float = Field(5e-2, gt=0, description="its learning rate")
    layers: list[float] = Field(
        [8 / 32, 16 / 32, 24 / 32, 30 / 32], description="layers whose MLP is perturbed, as shares of the depth"
    )
    retain: Literal["nll", "retain_kl"] = Field(
        "nll", description="cross-entropy of aligned's harmless answers, or KL from aligned along them"
    )
    retain_weight: float = Field(1.5, ge=0, description="weight of that, where refusals and pushing away have 0.5 each")
    depth: LongestHarmful = Field(default_factory=LongestHarmful)

    recovery_sequences = 2
    perturbs_layers = True
    published = (("train.lr", 2e-05), ("train.lora_rank", 64), ("train.steps", 100))
    departures = (
        "the student moves once for each perturbation, not four times, and its optimizer is not reset",
        "only the prompt is perturbed",
    )

    @property
    def extra_passes(self) -> float:
        """The steps of the adversary."""
        return float(self.inner_steps)

    def own_terms(self) -> tuple[Term, ...]:
        """Both terms of harmful prompts, and the anchor under a name that no measurement steers."""
        from raycomplete.losses.terms import Term, get, nll

        return (
            Term("toward", "toward refusal", "-log p_s of refusals under the adversary", nll, reads=()),
            Term("away", "away from h", "-log(1 - p_s) of h under the adversary", away_rows, reads=()),
            replace(get("anchor"), name="retain_kl", label="retain"),
        )

    def loss_weights(self) -> dict[str, float]:
        """Divides the authors' coefficients by their sum."""
        weights = {self.retain: self.retain_weight, "toward": 0.5, "away": 0.5}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def sequences(self, item: Item) -> tuple[TrainSequence, ...]:
        """A harmless prompt and its answer; or x and r, and x and h, which share a perturbation."""
        if isinstance(item, AnchorItem):
            return (harmless_answer(item, self.retain, is_read=self.retain == "retain_kl"),)
        prompt, first = item.sample.prompt_ids, item.sample.refusal_prefix_tokens
        both = (("toward", item.sample.refusal_ids), ("away", item.sample.harmful_ids[first:]))
        return tuple(
            TrainSequence(prompt + response, (RowSpan(term, len(prompt), len(response)),)) for term, response in both
        )

    def student_pass(self, lm: Any) -> StudentPass:
        """Lets the adversary move first."""
        import torch

        sites = self._sites(lm)

        def run(student: Any, batch: Any) -> Any:
            is_toward_N, is_away_N = (batch.term_N == batch.terms.index(name) for name in ("toward", "away"))
            if not is_toward_N.any():
                return student.total(student.states(batch).last_hidden_state, batch, {})
            position_P, place_P = shared_prompts(batch, is_toward_N, is_away_N)
            weight = lm.get_input_embeddings().weight
            shape = (int(place_P.max()) + 1, weight.shape[1])
            dtype = torch.promote_types(weight.dtype, torch.float32)
            deltas = [weight.new_zeros(shape, dtype=dtype, requires_grad=True) for _ in sites]
            optimizer = torch.optim.AdamW(deltas, lr=self.inner_lr)
            with perturbed(sites, deltas, position_P, place_P):
                for _ in range(self.inner_steps):
                    hidden_NH = student.states(batch).last_hidden_state.flatten(0, 1)[batch.row_N]
                    (log_p_N,) = student.head_loss("log_probs", hidden_NH, batch)
                    loss = -0.5 * log_p_N[is_away_N].mean() + 0.5 * away(log_p_N[is_toward_N]).mean()
                    # Gradients of the perturbation alone: nothing reaches the student's own.
                    for delta, gradient in zip(deltas, torch.autograd.grad(loss, deltas), strict=True):
                        delta.grad = gradient
                    optimizer.step()
                    with torch.no_grad():
                        for delta in deltas:
                            delta.mul_((self.epsilon / delta.norm(dim=-1, keepdim=True)).clamp(max=1))
                return student.total(student.states(batch).last_hidden_state, batch, {})

        return run

    def _sites(self, lm: Any) -> list[nn.Module]:
        layers = getattr(lm.base_model, "layers", [])
        if not layers or not hasattr(layers[0], "mlp"):
            raise SetupError(
                f"latent_adversarial looks for layers with an mlp, and {type(lm).__name__} has none.",
                "Use a model of another family, or another method.",
            )
        places = sorted({min(int(share * len(layers)), len(layers) - 1) for share in self.layers})
        return [lm.get_input_embeddings(), *(layers[place].mlp for place in places)]


def shared_prompts(batch: Any, is_toward_N: Tensor, is_away_N: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of the prompt tokens of both sequences of each pair [P], and the perturbation that each takes [P].

    Sequences of an item stand one after the other, so the first with refusal rows belongs to the first with rows of h.
    """
    import torch

    positions, places = [], []
    for is_own_N in (is_toward_N, is_away_N):
        place = 0
        for sequence in batch.sequence_N[is_own_N].unique():
            first = batch.row_N[is_own_N & (batch.sequence_N == sequence)].min()
            length = int(batch.position_ids_BT.flatten()[first]) + 1
            own_T = torch.arange(length, device=first.device)
            positions.append(first - length + 1 + own_T)
            places.append(place + own_T)
            place += length
    return torch.cat(positions), torch.cat(places)


@contextmanager
def perturbed(sites: list[nn.Module], deltas: list[Tensor], position_P: Tensor, place_P: Tensor) -> Iterator[None]:
    """Adds rows `place_P` of each site's perturbation to its output at flat positions `position_P`."""

    def hook_of(delta: Tensor) -> Any:
        def hook(module: nn.Module, arguments: Any, output_BTH: Tensor) -> Tensor:
            flat_NH = output_BTH.flatten(0, 1)
            return flat_NH.index_add(0, position_P, delta[place_P].to(flat_NH.dtype)).view_as(output_BTH)

        return hook

    handles = [site.register_forward_hook(hook_of(delta)) for site, delta in zip(sites, deltas, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
