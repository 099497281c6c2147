"""Circuit breakers: inner states of harmful text are turned away from where they were, those of other text are kept.

Source: Zou et al., arXiv 2406.04313, known to us by secondary sources (suv11235/circuit-breakers,
`docs/grayswanai_technical_analysis.md`, and a derived trainer). With z^l the hidden states of layer l, s with LoRA
adapters on and a with them off, t the share of the training that is done:

    reroute: alpha (1 - t / 2) mean over target layers and tokens of relu(cos(z_s, z_a)), on x and h
    retain:  alpha t / 2       mean over all layers and tokens of ||z_s - z_a||_2, on prompts and aligned's answers

Retained are harmless and borderline answers and aligned's own refusals. Theirs besides: layers 10 and 20 of 32, alpha
10 (Mistral 5), adapters of rank 16 with alpha 16 and dropout 0.05 on layers 0 to 20 while the upper ones are left out,
150 steps, batches of 16, `train: {lr: 1.0e-4, lora_rank: 16}`. At the start model the cosine is 1 and has no gradient,
so that in float32, without the rounding of bfloat16, the retain term would hold adapters there: hence
`adapter_init_std`. On the organism 40 steps behind ten of warm-up turn nothing away even so (cosine 0.9998), 80 without
warm-up do (0.36): set `train.warmup_steps` to 0.

Answers to harmful prompts often become babble: look at the outcome `incoherent` beside the rates.
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
    StudentPass,
    TrainSequence,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

    from raycomplete.losses.terms import Term


def reroute(own_LNH: Tensor, start_LNH: Tensor) -> Tensor:
    """Mean over layers of relu(cos) of states with those of the start model [N]."""
    norms_LN = own_LNH.norm(dim=-1) * start_LNH.norm(dim=-1)
    cosine_LN: Tensor = (own_LNH * start_LNH).sum(dim=-1) / norms_LN.clamp(min=1e-8)
    return cosine_LN.relu().mean(dim=0)


def retain(own_LNH: Tensor, start_LNH: Tensor) -> Tensor:
    """Mean over layers of the distance of states from those of the start model [N]."""
    distance_LN: Tensor = (own_LNH - start_LNH).norm(dim=-1)
    return distance_LN.mean(dim=0)


class _LongestHarmful(LongestHarmful):
    """Only `max` counts, the longest h (256 tokens)."""

    max: int = Field(256, ge=1, description="longest harmful continuation, in tokens")


@register
class CircuitBreakers(Method):
    """Turns inner states of harmful text away from where they were, and keeps those of other text."""

    name: Literal["circuit_breakers"] = Field("circuit_breakers", description="which method")
    alpha: float = Field(10.0, gt=0, description="weight of both terms")
    target_layers: list[float] = Field(
        [10 / 32, 20 / 32], min_length=1, description="layers whose states are turned away, as shares of the depth"
    )
    adapter_init_std: float = Field(
        0.01, ge=0, description="standard deviation of the adapters' second factor at the start"
    )
    depth: _LongestHarmful = Field(default_factory=_LongestHarmful)

    needs_lora = True
    published = (("train.lr", 0.0001), ("train.lora_rank", 16), ("train.steps", 150))
    departures = (
        "adapters are this trainer's: on all layers, alpha twice the rank, no dropout, a little off the start model",
        "all layers are computed and retained",
    )

    @property
    def extra_passes(self) -> float:
        """A forward pass with adapters off: a third of a forward and a backward one."""
        return 1 / 3

    def own_terms(self) -> tuple[Term, ...]:
        """Both, computed by the pass."""
        from raycomplete.losses.terms import Term, computed_in_pass

        return (
            Term("retain", "retain", "distance of states from those of aligned", computed_in_pass, reads=()),
            Term(
                "reroute", "reroute", "relu of the cosine of states with those of aligned", computed_in_pass, reads=()
            ),
        )

    def loss_weights(self) -> dict[str, float]:
        """One weight, shared out by `schedule`."""
        return {"retain": self.alpha, "reroute": self.alpha}

    def schedule(self, progress: float) -> dict[str, float]:
        """From rerouting alone to equal parts."""
        return {"retain": progress / 2, "reroute": 1 - progress / 2}

    def sequence(self, item: Item) -> TrainSequence:
        """A prompt and what follows, h or aligned's answer; a row each token that is read."""
        if isinstance(item, AnchorItem):
            token_ids = item.sample.prompt_ids + item.sample.answer_ids
            spans = () if item.sample.complies else (RowSpan("retain", 1, len(token_ids) - 1),)
            return TrainSequence(token_ids, spans)
        token_ids = item.sample.prompt_ids + item.sample.harmful_ids
        return TrainSequence(token_ids, (RowSpan("reroute", 1, len(token_ids) - 1),), len(item.sample.harmful_ids))

    def student_pass(self, lm: Any) -> StudentPass:
        """Reads each batch twice, without and with adapters."""
        import torch

        from raycomplete.losses.torch_rows import TermRows

        for name, weight in lm.named_parameters():
            if "lora_B" in name and self.adapter_init_std > 0 and not weight.any():
                torch.nn.init.normal_(weight, std=self.adapter_init_std)

        def run(student: Any, batch: Any) -> Any:
            with torch.no_grad(), student.without_adapters():
                start = student.states(batch, output_hidden_states=True).hidden_states
            own = student.states(batch, output_hidden_states=True)
            depth, number_N = len(start) - 1, batch.term_N
            chosen = [min(max(round(share * depth), 1), depth) for share in self.target_layers]

            def rows(term: str, layers: list[int]) -> tuple[Tensor, Tensor]:
                row_N = batch.row_N[number_N == batch.terms.index(term)]
                mine, theirs = (
                    torch.stack([states[layer].flatten(0, 1)[row_N].float() for layer in layers])
                    for states in (own.hidden_states, start)
                )
                return mine, theirs

            found = {
                "retain": TermRows(retain(*rows("retain", list(range(depth + 1))))),
                "reroute": TermRows(reroute(*rows("reroute", chosen))),
            }
            return student.total(own.last_hidden_state, batch, found)

        return run
