"""Settings of the loss. Importable without torch: training methods use them as sections of the run file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from raycomplete.runtime.section import Section

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Backend = Literal["auto", "torch", "triton"]
ChunkTokens = int | Literal["auto"]


class ContrastiveSettings(Section):
    """Contrastive teacher q ~ p_a (p_a / p_b)^alpha; alpha 0 is off."""

    alpha: float = Field(0.0, ge=0, description="strength; 0 is off")
    plausibility: float = Field(0.1, gt=0, le=1, description="keep v with p_a(v) >= plausibility * max p_a")


class DivergenceSettings(Section):
    """Divergence T^2 D(q, p_s) of the terms `anchor` and `recovery`."""

    divergence: Divergence = Field(
        "forward_kl", description="KL(q || p_s), KL(p_s || q), or the mean KL of both to their middle"
    )
    temperature: float = Field(
        1.0, gt=0, description="T, which divides the logits of all models; T^2 keeps the size of value and gradient"
    )
    contrastive: ContrastiveSettings = Field(default_factory=ContrastiveSettings)

    @model_validator(mode="after")
    def _is_finite(self) -> DivergenceSettings:
        if self.contrastive.alpha > 0 and self.divergence == "reverse_kl":
            raise ValueError(
                "reverse_kl must not meet a contrastive teacher: that excludes tokens, so KL(p_s || q) is infinite. "
                "Set contrastive.alpha to 0, or use jsd or forward_kl."
            )
        return self


class PushForwardSettings(DivergenceSettings):
    """Divergence T^2 D(q, p_s) of the term `push_forward`, with q at position 0 of the answer."""

    temperature: float = Field(4.0, gt=0, description="T, which divides the logits of both: above 1 the tail counts")


class BaseFavoredSettings(Section):
    """Base-favored tokens B_t = {v : p_b(v) > e^margin p_a(v), p_b(v) >= tau}, p_a at position 0 of the answer."""

    tau: float = Field(0.01, ge=0, le=1, description="smallest p_base of a base-favored token")
    margin: float = Field(0.1, ge=0, description="nats by which log p_base must exceed log p_aligned")


class PenaltySettings(BaseFavoredSettings):
    """Penalty on base-favored tokens, the sum over B_t of p_s(v)^2."""


@dataclass(frozen=True)
class LossSettings:
    """Terms of a loss, their weights and options, and how it is computed.

    Attributes:
        weights: Weight of each term, by its name in `raycomplete.losses.terms.TERMS`. Their order numbers the terms:
            `LossInputs.term_N` holds these numbers.
        options: Settings of a term where they are not its defaults, by name.
        chunk_tokens: Rows whose logits exist at a time, or "auto" (see `rows_per_chunk`).
        backend: "torch", "triton", or "auto": Triton where it runs (see `raycomplete.losses.loss`), else PyTorch.
    """

    weights: Mapping[str, float]
    options: Mapping[str, Section] = field(default_factory=dict)
    chunk_tokens: ChunkTokens = "auto"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.chunk_tokens != "auto" and self.chunk_tokens < 1:
            raise ValueError(f'chunk_tokens must be at least 1, or "auto", got {self.chunk_tokens}.')
        if unknown := [name for name in self.options if name not in self.weights]:
            raise ValueError(f"Options must belong to terms with a weight ({', '.join(self.weights)}), got {unknown}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms by their numbers."""
        return tuple(self.weights)
