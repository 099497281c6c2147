"""Circuit breakers: inner states of harmful text are turned away from where they were, those of other text are kept.

Source: Zou et al., arXiv 2406.04313, known to us by secondary sources (suv11235/circuit-breakers,
`docs/grayswanai_technical_analysis.md`, and a derived trainer). With z^l the hidden states of layer l, s with LoRA
adapters on and a with them off, t the share of the training that is done:

    reroute: alpha (1 - t / 2) mean over target layers and tokens of relu(cos(z_s, z_a)), on x and h
    retain:  alpha t / 2       mean over all layers and tokens of ||z_s - z_a||_2, on prompts and aligned's answers

Retained are harmless and borderline answers and aligned's own refusals. Theirs besides: layers 10 and 20 of 32, alpha
10 (Mistral 5), adapters of rank 16 with alpha 16 and dropout 0.05 on layers 0 to 20 while the upper ones are left out,
150 steps, batches of 16, `train: {lr: 1.0e-4, lora_rank: 16}`. At the start model the cosine is 1 and has no gradient:
in float32 the retain term would hold adapters there, hence `adapter_init_std`. On the organism, `train.warmup_steps` 0
is needed (cosine 0.36 after 80 steps). Answers to harmful prompts often become babble: see the outcome `incoherent`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    OwnTerm,
    RowSpan,
    StudentPass,
    TrainSequence,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


def reroute(own_LNH: Tensor, start_LNH: Tensor) -> Tensor:
    """Mean over layers of relu(cos) of states with those of the start model [N]."""
    norms_LN = own_LNH.norm(dim=-1) * start_LNH.norm(dim=-1)
    cosine_LN: Tensor = (own_LNH * start_LNH).sum(dim=-1) / norms_LN.clamp(min=1e-8)
    return cosine_LN.relu().mean(dim=0)


def retain(own_LNH: Tensor, start_LNH: Tensor) -> Tensor:
    """Mean over layers of the distance of states from those of the start model [N]."""
    distance_LN: Tensor = (own_LNH - start_LNH).norm(dim=-1)
    return distance_LN.mean(dim=0)


class _Longest(LongestHarmful):
    max: int = Field(256, ge=1, description="longest harmful continuation, in tokens")


@register
class CircuitBreakers(Method):
    """Turns inner states of harmful text away from where they were, and keeps those of other text."""

    name: Literal["circuit_breakers"] = "circuit_breakers"
    alpha: float = Field(10.0, gt=0, description="weight of both terms")
    depth: _Longest = Field(default_factory=_Longest)

    target_layers: ClassVar[tuple[float, ...]] = (10 / 32, 20 / 32)  # as shares of the depth
    adapter_init_std: ClassVar[float] = 0.01  # of the adapters' second factor at the start
    needs_lora = True
    published = (("train.lr", 0.0001), ("train.lora_rank", 16), ("train.steps", 150))
    departures = (
        "adapters are this trainer's: on all layers, alpha twice the rank, no dropout, a little off the start model",
        "all layers are computed and retained",
    )
    terms = (
        OwnTerm("retain", "retain", "distance of states from those of aligned"),
        OwnTerm("reroute", "reroute", "relu of the cosine of states with those of aligned"),
    )

    @property
    def extra_passes(self) -> float:
        return 1 / 3  # a forward pass with adapters off

    def loss_weights(self) -> dict[str, float]:
        return {"retain": self.alpha, "reroute": self.alpha}

    def schedule(self, progress: float) -> dict[str, float]:
        return {"retain": progress / 2, "reroute": 1 - progress / 2}

    def sequence(self, item: Item) -> TrainSequence:
        if isinstance(item, AnchorItem):
            token_ids = item.sample.prompt_ids + item.sample.answer_ids
            spans = () if item.sample.complies else (RowSpan("retain", 1, len(token_ids) - 1),)
            return TrainSequence(token_ids, spans)
        token_ids = item.sample.prompt_ids + item.sample.harmful_ids
        return TrainSequence(token_ids, (RowSpan("reroute", 1, len(token_ids) - 1),), len(item.sample.harmful_ids))

    def student_pass(self, lm: Any) -> StudentPass:
        import torch

        from raycomplete.losses.torch_rows import TermRows

        for name, weight in lm.named_parameters():
            if "lora_B" in name and self.adapter_init_std > 0 and not weight.any():
                torch.nn.init.normal_(weight, std=self.adapter_init_std)

        def run(student: Any, batch: Any) -> Any:
            with torch.no_grad(), student.without_adapters():
                start = student.states(batch, output_hidden_states=True).hidden_states
            own = student.states(batch, output_hidden_states=True)
            depth = len(start) - 1
            chosen = [min(max(round(share * depth), 1), depth) for share in self.target_layers]
            found = {}
            for term, formula, layers in (("retain", retain, range(depth + 1)), ("reroute", reroute, chosen)):
                row_N = batch.row_N[batch.term_N == batch.terms.index(term)]
                own_LNH, start_LNH = (
                    torch.stack([states[layer].flatten(0, 1)[row_N].float() for layer in layers])
                    for states in (own.hidden_states, start)
                )
                found[term] = TermRows(formula(own_LNH, start_LNH))
            return student.total(own.last_hidden_state, batch, found)

        return run
