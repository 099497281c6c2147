"""The distillation loss: all its terms in one pass, without [N, V] logits in memory. For any trainer.

    states = model.base_model(input_ids).last_hidden_state.flatten(0, 1)     # the student's, attached to its graph
    inputs = LossInputs(
        student=HiddenStates(states[rows], Head(model.lm_head.weight)),
        aligned=HiddenStates(aligned_states, aligned_head),                  # frozen, in the teacher's context
        base=None,                                                           # for penalty and contrastive teacher
        term_N=torch.tensor([0, 0, 1, 2, 2]),                                # numbers of the settings' terms
        weight_N=torch.full((5,), 0.2),
    )
    settings = LossSettings(weights={"anchor": 1.0, "recovery": 1.0, "push_forward": 1.0})
    output = distillation_loss(inputs, settings)
    output.total.backward()
    print(output.losses["recovery"])

Rows are taken in chunks (`chunked_pass`). While the logits of a chunk are in hand its gradients are taken and summed
into [N, H] and [V, H] buffers, so peak memory is O(N*H + V*H + chunk*V) and backward only scales what was saved. What
happens to a chunk's logits in between is up to each term (`terms`): in PyTorch, or in Triton for CUDA. "auto" takes
Triton on a CUDA device where it is installed, for heads in bfloat16, float16 or float32 and terms that have a Triton
function; everything else goes to PyTorch, float64 among it.

N token rows, C rows of one chunk, P rows that read a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raycomplete.losses.chunked_pass import chunked_pass
from raycomplete.losses.heads import HiddenStates, check_hidden, check_rows_finite, check_same_vocabulary
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import ActiveTerm, Teacher, active_terms

TEACHERS: tuple[Teacher, ...] = ("aligned", "base")


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Token rows of the three models. H may differ between them.

    A row's frozen states are those at the position of its target, in whatever context the teacher read; rows that share
    a target repeat its states.

    Attributes:
        student: Hidden states [N, H] and head of the student; gradients go to both, where they require grad. The head
            is bfloat16, float32 or float64.
        aligned: The aligned model's, on the rows whose term reads it, in order [P, H]; None where there is none.
        base: The same of base.
        term_N: Number of each row's term in `LossSettings.weights` [N], integers.
        weight_N: Weight of each row [N], beside the weight of its term.
        token_N: Token that follows at each row [N], for terms that ask for it.
        sequence_N: Number of the sequence that each row belongs to [N], for terms with a loss of whole sequences. All
            rows of a sequence must be there, and those of one term have one weight.
    """

    student: HiddenStates
    aligned: HiddenStates | None
    base: HiddenStates | None
    term_N: Tensor
    weight_N: Tensor
    token_N: Tensor | None = None
    sequence_N: Tensor | None = None

    @property
    def teachers(self) -> dict[Teacher, HiddenStates]:
        """The frozen models that are there."""
        both: tuple[tuple[Teacher, HiddenStates | None], ...] = (("aligned", self.aligned), ("base", self.base))
        return {role: states for role, states in both if states is not None}

    def reads(self, terms: Sequence[ActiveTerm], role: Teacher) -> Tensor:
        """Tells which rows read a frozen model [N], boolean, on the device of `term_N`."""
        reads_T = torch.tensor([role in item.teachers for item in terms], device=self.term_N.device)
        return reads_T[self.term_N.long()]

    def check(self, terms: Sequence[ActiveTerm], *, must_be_finite: bool = True) -> None:
        """Refuses inputs that do not fit together (ValueError), or that are not finite (NotFiniteError)."""
        num_rows = self.student.hidden_NH.shape[0]
        given = {"term": self.term_N, "weight": self.weight_N, "token": self.token_N, "sequence": self.sequence_N}
        for name, values in given.items():
            if values is not None and tuple(values.shape) != (num_rows,):
                raise ValueError(f"{name} must be [{num_rows}], one a token row, got {list(values.shape)}.")
        in_range = not num_rows or 0 <= int(self.term_N.min()) <= int(self.term_N.max()) < len(terms)
        if self.term_N.is_floating_point() or not in_range:
            numbers = ", ".join(f"{number} {item.term.name}" for number, item in enumerate(terms))
            raise ValueError(f"term must hold the numbers of the settings' terms: {numbers}.")
        if self.sequence_N is None and any(item.term.sequence_loss for item in terms):
            raise ValueError("A term has a loss of whole sequences, but LossInputs.sequence_N is None.")
        if self.student.head.weight_VH.dtype == torch.float16:
            raise ValueError("A float16 student head underflows in the loss; use bfloat16 or float32.")
        check_rows_finite("weight", self.weight_N)
        check_hidden("student", *self.student, num_rows, must_be_finite=must_be_finite)
        heads = {"student": self.student.head}
        for role in TEACHERS:
            num_read, states = int(self.reads(terms, role).sum()), self.teachers.get(role)
            if states is None and num_read:
                raise ValueError(f"{num_read} rows need {role} (see Term.reads), but LossInputs.{role} is None.")
            if states is not None and num_read:
                check_hidden(role, *states, num_read, must_be_finite=must_be_finite)
                heads[role] = states.head
        check_same_vocabulary(heads)

    def rows(self, terms: Sequence[ActiveTerm], row_P: Tensor) -> LossInputs:
        """Takes some of the rows, in their order, with the states that they read."""
        is_kept_N = torch.zeros_like(self.term_N, dtype=torch.bool).index_fill(0, row_P, True)

        def part(role: Teacher) -> HiddenStates | None:
            states = self.teachers.get(role)
            reads_N = self.reads(terms, role)
            return None if states is None else HiddenStates(states.hidden_NH[is_kept_N[reads_N]], states.head)

        return LossInputs(
            HiddenStates(self.student.hidden_NH[row_P], self.student.head),
            part("aligned"),
            part("base"),
            self.term_N[row_P],
            self.weight_N[row_P],
            None if self.token_N is None else self.token_N[row_P],
            None if self.sequence_N is None else self.sequence_N[row_P],
        )


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The loss and what it saw on the way; everything but `total` is detached.

    Attributes:
        total: sum over rows of weight * weight of the term * row loss; differentiable scalar.
        losses: sum over a term's rows of weight * row loss, without the term's weight, by term; scalars.
        row_loss_N: Unweighted loss of each row [N]; that of a sequence in equal parts over its rows.
        metrics: Values by metric, for the rows of the term that has it, in their order among the N rows.
    """

    total: Tensor
    losses: dict[str, Tensor]
    row_loss_N: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def flatten(self) -> tuple[Tensor, ...]:
        """The same as a plain tuple: DeepSpeed's hooks look for tensors in tuples only."""
        return (self.total, self.row_loss_N, *self.losses.values(), *self.metrics.values())

    @classmethod
    def unflatten(cls, values: tuple[Tensor, ...], settings: LossSettings) -> LossOutput:
        """Names again what `flatten` gave of a loss with these settings."""
        names = settings.names
        metrics = [name for item in active_terms(settings) for name in item.term.metrics]
        total, row_loss_N, *rest = values
        losses = dict(zip(names, rest[: len(names)], strict=True))
        return cls(total, losses, row_loss_N, dict(zip(metrics, rest[len(names) :], strict=True)))


def distillation_loss(inputs: LossInputs, settings: LossSettings, *, must_be_finite: bool = True) -> LossOutput:
    """Computes the weighted sum of all terms over all rows, and its gradient.

    Differentiable once, in the student's hidden states and in weight and bias of its head, where those require grad.
    What comes from frozen models carries no gradient. Under ZeRO-3 the head must be gathered around this call; backward
    does not read it.

    Args:
        inputs: Rows of the models.
        settings: Terms, their weights and options.
        must_be_finite: Whether NaN and infinity are refused. Else they reach the rows that they belong to, the loss and
            its gradients, for a caller that leaves such a step out.

    Returns:
        The loss in float32 (float64 for a float64 student head), with its terms and per-row metrics.

    Raises:
        ValueError: Shapes, vocabularies, numbers of terms or the student's dtype do not fit.
        NotFiniteError: An input holds NaN or infinity, or a row's loss came out so, where `must_be_finite`; names it
            and the first bad row.
        SetupError: The settings ask for Triton where it does not run.
        ConfigError: A term of the settings is not in the table.
    """
    terms = active_terms(settings)
    inputs.check(terms, must_be_finite=must_be_finite)
    device, dtype = inputs.student.hidden_NH.device, inputs.student.head.logits_dtype
    term_N = inputs.term_N.detach().to(device).long()
    weight_N = inputs.weight_N.detach().to(device, dtype)
    token_N = None if inputs.token_N is None else inputs.token_N.to(device)
    sequence_N = None if inputs.sequence_N is None else inputs.sequence_N.to(device).long()
    inputs = LossInputs(inputs.student, inputs.aligned, inputs.base, term_N, weight_N, token_N, sequence_N)
    factor_N = weight_N * torch.tensor([item.weight for item in terms], dtype=dtype, device=device)[term_N]

    with torch.autocast(device.type, enabled=False):  # dtypes are those of the heads, not of an outer autocast
        summed_P, slope_P, loss_P = _sequence_losses(inputs, terms, settings)
        gradient_N = factor_N.index_copy(0, summed_P, factor_N[summed_P] * slope_P)
        row_loss_N, metrics, gradients = chunked_pass(inputs, terms, gradient_N, settings)
        row_loss_N[summed_P] = loss_P
        if must_be_finite:
            check_rows_finite("the loss of the student", row_loss_N)
        weighted_N = weight_N * row_loss_N
        total = gradients.attach((factor_N * row_loss_N).sum())

    losses = {name: weighted_N[term_N == number].sum() for number, name in enumerate(settings.names)}
    return LossOutput(total=total, losses=losses, row_loss_N=row_loss_N, metrics=metrics)


def _sequence_losses(
    inputs: LossInputs, terms: Sequence[ActiveTerm], settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the losses of whole sequences in a first pass: numbers of the rows [P], f' for each, each row's part of f.

    The gradient of f(sum of values) is f' of that sum times the gradient of the values: rows need their sequence's f'
    as a factor before their own gradient is taken, while their logits are in hand.
    """
    with_sequences = [number for number, item in enumerate(terms) if item.term.sequence_loss is not None]
    summed_P = torch.isin(inputs.term_N, inputs.term_N.new_tensor(with_sequences)).nonzero()[:, 0]
    slope_P, loss_P = (inputs.weight_N.new_zeros(len(summed_P)) for _ in range(2))
    if not len(summed_P):
        return summed_P, slope_P, loss_P
    part = inputs.rows(terms, summed_P)
    with torch.no_grad():
        value_P, _, _ = chunked_pass(part, list(terms), slope_P, settings)
    assert part.sequence_N is not None, "checked above"
    for number in with_sequences:
        own_R = (part.term_N == number).nonzero()[:, 0]
        _, place_R, count_S = part.sequence_N[own_R].unique(return_inverse=True, return_counts=True)
        sum_S = value_P.new_zeros(len(count_S)).index_add_(0, place_R, value_P[own_R])
        sequence_loss = terms[number].term.sequence_loss
        assert sequence_loss is not None
        with torch.enable_grad():
            loss_S = sequence_loss(sum_S.requires_grad_(), terms[number].options)
            (slope_S,) = torch.autograd.grad(loss_S.sum(), sum_S)
        loss_S = loss_S.detach()
        slope_P[own_R], loss_P[own_R] = slope_S[place_R], (loss_S / count_S)[place_R]
    return summed_P, slope_P, loss_P
