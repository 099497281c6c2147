"""The distillation loss as plainly as it can be written: float64, all logits in memory, autograd. For tests.

It takes its formulas from the table of terms and shares nothing else with `loss` but the types: neither logits, sums
nor gradients, nor the fused functions of terms, so that agreement means something.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycomplete.losses.heads import HiddenStates
from raycomplete.losses.loss import LossInputs, LossOutput
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import LogProbs, active_terms


def reference_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """Same arguments and result as `loss.distillation_loss`, in float64, without its checks; takes [N, V] memory."""
    terms = active_terms(settings)
    student_NV = _log_probs(inputs.student)
    row_loss_N = torch.zeros(len(student_NV), dtype=torch.float64)
    total = student_NV[:0].sum()  # 0 that a gradient runs through, so that a batch without rows has one as well
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for number, (name, active) in enumerate(zip(settings.names, terms, strict=True)):
        rows_N = inputs.term_N == number
        if not rows_N.any():
            losses[name] = torch.zeros((), dtype=torch.float64)
            metrics |= {metric: torch.zeros(0, dtype=torch.float64) for metric in active.term.metrics}
            continue
        frozen = {}
        for role in active.teachers:
            own_P = rows_N[inputs.reads(terms, role)]  # a teacher has the rows that read it only
            frozen[role] = _log_probs(inputs.teachers[role])[own_P].detach()
        tokens = None if inputs.token_N is None else inputs.token_N[rows_N]
        rows = LogProbs(student_NV[rows_N], frozen.get("aligned"), frozen.get("base"), tokens)
        found = active.term.formula(rows, active.options)
        loss_R = found.loss_R
        if active.term.sequence_loss is not None and inputs.sequence_N is not None:
            sequence_R = inputs.sequence_N[rows_N]
            loss_R = torch.zeros_like(loss_R)
            for sequence in sequence_R.unique():
                of_whole = active.term.sequence_loss(found.loss_R[sequence_R == sequence].sum()[None], active.options)
                loss_R = torch.where(sequence_R == sequence, of_whole / (sequence_R == sequence).sum(), loss_R)
        loss = (inputs.weight_N.double()[rows_N] * loss_R).sum()
        total = total + active.weight * loss
        row_loss_N[rows_N] = loss_R.detach()
        losses[name] = loss.detach()
        metrics |= {metric: values.detach() for metric, values in found.metrics.items()}
    return LossOutput(total=total, losses=losses, row_loss_N=row_loss_N, metrics=metrics)


def _log_probs(states: HiddenStates) -> Tensor:
    """log_softmax(softcap * tanh(scale * (hidden @ weight^T + bias) / softcap)) in float64."""
    hidden_NH, head = states
    logits_NV = hidden_NH.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return torch.log_softmax(logits_NV, dim=-1)
