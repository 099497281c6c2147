"""Implementations of the loss, one function each: problem in, scalar loss out, both gradients after `backward`.

On anchor rows each is the mean over rows of KL(p_aligned || p_student) at temperature 1. No other library mixes terms,
so on mixed rows there are only raycomplete and plain PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raycomplete.losses.loss import distillation_loss
from raycomplete.losses.settings import PushForwardSettings
from tests.benchmarks.loss.problem import ANCHOR, PUSH_FORWARD, Mix, Problem

Loss = Callable[[Problem], Tensor]

# TRL keeps its off-policy trainer under "experimental", which warns at import.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass(frozen=True)
class Variant:
    """One implementation: `load` imports what it needs, and raises ImportError where that is not installed."""

    name: str
    load: Callable[[], Loss]
    mixed: bool = False  # takes rows of several terms
    devices: tuple[str, ...] = ("cpu", "cuda")

    def takes(self, mix: Mix, device: torch.device) -> bool:
        """Tells whether there is something to measure."""
        return (self.mixed or mix is Mix.ANCHOR) and device.type in self.devices


def _raycomplete() -> Loss:
    return lambda problem: distillation_loss(problem.inputs, problem.settings).total


def _plain() -> Loss:
    """The logits of every model in memory at once: bfloat16 products, float32 softmax, autograd."""

    def logits(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return (hidden_NH @ weight_VH.T).float()

    def kl(log_student_NV: Tensor, log_aligned_NV: Tensor) -> Tensor:
        return F.kl_div(log_student_NV, log_aligned_NV, reduction="none", log_target=True).sum(dim=-1)

    def loss(problem: Problem) -> Tensor:
        weights, term_N = problem.settings.weights, problem.term_N
        student_NV = logits(problem.student_hidden_NH, problem.student_weight_VH)
        with torch.no_grad():
            aligned_NV = logits(problem.aligned_hidden_NH, problem.aligned_weight_VH)
        if problem.mix is Mix.ANCHOR:
            return kl(student_NV.log_softmax(dim=-1), aligned_NV.log_softmax(dim=-1)).mean()
        pushed_N = term_N == PUSH_FORWARD
        kl_N = kl(student_NV[~pushed_N].log_softmax(dim=-1), aligned_NV[~pushed_N].log_softmax(dim=-1))
        weight_N = torch.where(term_N[~pushed_N] == ANCHOR, weights["anchor"], weights["recovery"])
        temperature = PushForwardSettings().temperature
        hot = [(item[pushed_N] / temperature).log_softmax(dim=-1) for item in (student_NV, aligned_NV)]
        pushed = weights["push_forward"] * temperature**2 * kl(*hot).sum()
        return ((weight_N * kl_N).sum() + pushed) / problem.num_rows

    return loss


def _liger_chunked(*, compiled: bool) -> Callable[[], Loss]:
    """Liger's chunked distillation: the softmax runs in bfloat16, and so does the sum of the weight's gradient."""

    def load() -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        fused: Any = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

        def loss(problem: Problem) -> Tensor:
            # Of the labels none is the ignored one, so every row counts.
            result: Tensor = fused(*problem.heads, torch.zeros_like(problem.term_N))
            return result

        return loss

    return load


def _liger_triton() -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused: Any = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss(problem: Problem) -> Tensor:
        result: Tensor = fused(*problem.heads, None)
        return result

    return loss


def _trl_chunked() -> Loss:
    """The loss of TRL's DistillationTrainer: tiles of logits, computed once forward and again backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(problem: Problem) -> Tensor:
        heads = (problem.student_hidden_NH, problem.student_weight_VH, None)
        teacher = (problem.aligned_hidden_NH, problem.aligned_weight_VH, None)
        divergence_N: Tensor = ChunkedDivergenceFunction.apply(*heads, *teacher, 0.0)[0]
        return divergence_N.mean()

    return loss


def _trl_gkd() -> Loss:
    """The loss of TRL's GKDTrainer on logits of the models' own dtype, as its trainer calls it."""
    from trl.experimental.gkd import GKDTrainer

    def loss(problem: Problem) -> Tensor:
        student_1NV = (problem.student_hidden_NH @ problem.student_weight_VH.T)[None]
        with torch.no_grad():
            aligned_1NV = (problem.aligned_hidden_NH @ problem.aligned_weight_VH.T)[None]
        divergence: Tensor = GKDTrainer.generalized_jsd_loss(student_1NV, aligned_1NV, beta=0.0, reduction="sum")
        return divergence / problem.num_rows

    return loss


OURS = "raycomplete"
PLAIN = "plain PyTorch"
VARIANTS = (
    Variant(OURS, _raycomplete, mixed=True),
    Variant(PLAIN, _plain, mixed=True),
    Variant("Liger chunked JSD", _liger_chunked(compiled=False)),
    Variant("Liger chunked JSD, compiled", _liger_chunked(compiled=True)),
    Variant("Liger Triton JSD", _liger_triton, devices=("cuda",)),
    Variant("TRL chunked (DistillationTrainer)", _trl_chunked),
    Variant("TRL materialised (GKDTrainer)", _trl_gkd),
)
