"""The tensors that every variant is given: N token rows, V vocabulary, H hidden."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from raycomplete.losses.heads import Head, HiddenStates
from raycomplete.losses.loss import LossInputs
from raycomplete.losses.settings import LossSettings

ANCHOR, RECOVERY, PUSH_FORWARD = range(3)
_LOGIT_SPREAD = 3.0  # peaked, as in a language model


class Mix(StrEnum):
    """Kinds of rows of a problem."""

    ANCHOR = "anchor"  # forward KL on every row, which is what other libraries offer
    MIXED = "mixed"  # what `completion` trains: 1/2 anchor, 1/4 recovery, 1/4 push-forward at its temperature


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; the student may be narrower than its teachers."""

    num_rows: int
    vocab_size: int
    hidden_size: int
    student_hidden_size: int = 0

    def __str__(self) -> str:
        student = f" (student {self.student_hidden_size})" if self.student_hidden_size else ""
        return f"N={self.num_rows}, V={self.vocab_size}, H={self.hidden_size}{student}"


@dataclass(frozen=True, eq=False)
class Problem:
    """Hidden states [N, H] and heads [V, H] in bfloat16; the student's take gradients. Every row weighs 1 / N."""

    mix: Mix
    student_hidden_NH: Tensor
    student_weight_VH: Tensor
    aligned_hidden_NH: Tensor
    aligned_weight_VH: Tensor
    term_N: Tensor  # anchor, recovery or push-forward
    settings: LossSettings

    @property
    def num_rows(self) -> int:
        return self.term_N.numel()

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden_NH, self.student_weight_VH

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the two gradients that a step leaves behind."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.trained)

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and weight of the student, then of aligned."""
        return *self.trained, self.aligned_hidden_NH, self.aligned_weight_VH

    @property
    def inputs(self) -> LossInputs:
        """The inputs of raycomplete's loss."""
        return LossInputs(
            HiddenStates(self.student_hidden_NH, Head(self.student_weight_VH)),
            HiddenStates(self.aligned_hidden_NH, Head(self.aligned_weight_VH)),
            None,
            self.term_N,
            torch.full((self.num_rows,), 1.0 / self.num_rows, device=self.term_N.device),
        )

    def clear_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None


def build_problem(shape: Shape, mix: Mix, device: torch.device, seed: int = 0) -> Problem:
    """Random models that agree in part: the student is aligned plus noise."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*sizes: int, scale: float) -> Tensor:
        return scale * torch.randn(*sizes, device=device, generator=generator)

    width, narrow = shape.hidden_size, shape.student_hidden_size or shape.hidden_size
    hidden_NH = noise(shape.num_rows, width, scale=1.0)
    weight_VH = noise(shape.vocab_size, width, scale=_LOGIT_SPREAD / width**0.5)
    stretch = (width / narrow) ** 0.5  # a narrower student keeps the spread of its logits
    student_hidden_NH = hidden_NH[:, :narrow] + noise(shape.num_rows, narrow, scale=0.3)
    cycle = [ANCHOR] if mix is Mix.ANCHOR else [ANCHOR, RECOVERY, ANCHOR, PUSH_FORWARD]
    # In runs, as a batch of sequences has them.
    terms = torch.tensor(cycle, device=device).repeat_interleave(-(-shape.num_rows // len(cycle)))
    return Problem(
        mix=mix,
        student_hidden_NH=student_hidden_NH.bfloat16().requires_grad_(),
        student_weight_VH=(stretch * weight_VH[:, :narrow]).bfloat16().requires_grad_(),
        aligned_hidden_NH=hidden_NH.bfloat16(),
        aligned_weight_VH=weight_VH.bfloat16(),
        term_N=terms[: shape.num_rows],
        settings=LossSettings({"anchor": 1.0, "recovery": 1.0, "push_forward": 1.0}),
    )
