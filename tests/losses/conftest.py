"""Random inputs for the loss, shared by its tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.losses import (
    ContrastiveSettings,
    DivergenceSettings,
    Head,
    HiddenStates,
    LossInputs,
    LossOutput,
    LossSettings,
    PushForwardSettings,
)

ANCHOR, RECOVERY, PUSH_FORWARD = NUMBERS = range(3)


def loss_settings(
    anchor: float = 1.0,
    recovery: float = 1.0,
    push_forward: float = 0.1,
    anchor_divergence: str = "forward_kl",
    recovery_divergence: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
    plausibility: float = 0.1,
    push_temperature: float = 4.0,
    **others: Any,
) -> LossSettings:
    """Settings of the three terms of the method `completion`; `others` are those of the whole loss."""
    contrastive = ContrastiveSettings(alpha=alpha, plausibility=plausibility)
    divergences = {
        name: DivergenceSettings(divergence=divergence, temperature=temperature, contrastive=contrastive)
        for name, divergence in (("anchor", anchor_divergence), ("recovery", recovery_divergence))
    }
    return LossSettings(
        weights={"anchor": anchor, "recovery": recovery, "push_forward": push_forward},
        options={**divergences, "push_forward": PushForwardSettings(temperature=push_temperature)},
        **others,
    )


@dataclass
class LossCase:
    """Rows of one call; the student's tensors are leaves that require grad, and base has a state for every row."""

    student_hidden_NH: Tensor
    student_head: Head
    aligned_hidden_NH: Tensor
    aligned_head: Head
    base_hidden_NH: Tensor
    base_head: Head
    term_N: Tensor
    weight_N: Tensor
    settings: LossSettings
    token_N: Tensor | None = None

    @property
    def inputs(self) -> LossInputs:
        """Inputs with the rows of base that the terms read."""
        inputs = LossInputs(
            HiddenStates(self.student_hidden_NH, self.student_head),
            HiddenStates(self.aligned_hidden_NH, self.aligned_head),
            None,
            self.term_N,
            self.weight_N,
            self.token_N,
        )
        if self.settings.options["anchor"].contrastive.alpha == 0:
            return inputs
        reads_N = self.term_N != PUSH_FORWARD
        return replace(inputs, base=HiddenStates(self.base_hidden_NH[reads_N], self.base_head))

    def run(self, loss: Callable[..., LossOutput]) -> LossOutput:
        """Calls either implementation."""
        return loss(self.inputs, self.settings)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken in."""
        head = self.student_head
        candidates = [self.student_hidden_NH, head.weight_VH, *([] if head.bias_V is None else [head.bias_V])]
        return [item for item in candidates if item.requires_grad]

    def gradients(self, loss: Callable[..., LossOutput]) -> list[Tensor]:
        """Gradients of the total in `leaves`."""
        return list(torch.autograd.grad(self.run(loss).total, self.leaves))


def named(output: LossOutput) -> dict[str, Tensor]:
    """Every tensor of an output by its name, detached."""
    found = {"total": output.total, "row_loss_N": output.row_loss_N, **output.losses, **output.metrics}
    return {name: value.detach() for name, value in found.items()}


def build_case(
    num_rows: int = 23,
    vocab_size: int = 31,
    hidden_sizes: tuple[int, int, int] = (8, 6, 5),
    dtype: torch.dtype = torch.float64,
    hidden_dtype: torch.dtype | None = None,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    terms: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **settings: Any,
) -> LossCase:
    """A random case; logits are about N(0, 1) so that no distribution is degenerate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(hidden_size: int) -> Head:
        weight_VH = (normal(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)
        return Head(weight_VH, normal(vocab_size).to(dtype) if bias else None, scale, softcap)

    hidden = [normal(num_rows, size).to(hidden_dtype or dtype) for size in hidden_sizes]
    heads = [head(size) for size in hidden_sizes]
    hidden[0].requires_grad_()
    heads[0].weight_VH.requires_grad_()
    if heads[0].bias_V is not None:
        heads[0].bias_V.requires_grad_()
    term_N = torch.tensor([row % 3 for row in range(num_rows)] if terms is None else list(terms), dtype=torch.long)
    weight_N = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    if weights is not None:
        weight_N = torch.tensor(list(weights), dtype=torch.float64)
    defaults: dict[str, Any] = {"anchor": 1.5, "recovery": 0.75, "push_forward": 2.0, "chunk_tokens": 4}
    return LossCase(
        hidden[0],
        heads[0],
        hidden[1],
        heads[1],
        hidden[2],
        heads[2],
        term_N,
        weight_N.to(torch.promote_types(dtype, torch.float32)),
        loss_settings(**{**defaults, **settings}),
    )


@pytest.fixture(scope="session")
def make_case() -> Callable[..., LossCase]:
    """`build_case`, as a fixture because test folders are not packages."""
    return build_case
