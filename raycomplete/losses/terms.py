"""The table of loss terms. Each part of the loss, the fused passes and the float64 reference find a term in `TERMS`.

A term is one row of the table. All it needs is a formula over log-probabilities:

    def formula(rows: LogProbs, options: Section) -> TermRows:
        log_p_R = rows.student_NV.gather(1, rows.token_N[:, None])[:, 0]
        return TermRows(-torch.log1p(-log_p_R.exp()), {"token_mass": log_p_R.exp().detach()})

    register(Term("turn_away", "turn away", "-log(1 - p_s) of a token", formula, metrics={"token_mass": "p_s"}))

PyTorch then computes it in blocks of rows, with its gradient by autograd on the block's logits, and the reference in
float64. `torch_block` and `triton` may give the same in fewer passes over the vocabulary. The formulas of the built-in
terms are ours, not those of arXiv 2511.12155; they share nothing with the fused functions that are tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from raycomplete.losses.base_favored import base_favored_mask, forward_kl
from raycomplete.losses.settings import (
    BaseFavoredSettings,
    DivergenceSettings,
    LossSettings,
    PenaltySettings,
    PushForwardSettings,
)
from raycomplete.losses.torch_rows import Block, BlockFunction, Product, RowLogits, TermRows, divergence_block
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section

Teacher = Literal["aligned", "base"]


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log-probabilities of some rows of one term [R, V], -inf where a model excludes a token.

    log_softmax(log_p / T) is the distribution at temperature T.

    Attributes:
        student_NV: The student's; the only ones that take a gradient.
        aligned: The aligned model's, where the term reads it: `aligned_NV`.
        base: Base's, where the term reads it: `base_NV`.
        tokens: Token that follows at each row [R], where the caller gave them: `token_N`.
    """

    student_NV: Tensor
    aligned: Tensor | None = None
    base: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def aligned_NV(self) -> Tensor:
        return _present(self.aligned, "aligned, which is not among what the term reads")

    @property
    def base_NV(self) -> Tensor:
        return _present(self.base, "base, which is not among what the term reads")

    @property
    def token_N(self) -> Tensor:
        return _present(self.tokens, "tokens, and LossInputs.token_N is None")


def _present(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"A formula asks for {name}.")
    return values


Formula = Callable[[LogProbs, Any], TermRows]


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the loss.

    Attributes:
        name: Key in `LossSettings.weights`, in metrics.jsonl and in Prometheus.
        label: Name in figures.
        description: What it is, in a line.
        formula: Loss and metrics of rows from their log-probabilities, differentiable in the student's; called with an
            instance of `options`.
        reads: Frozen models whose hidden states its rows need, or a function of its options that says so. A row that
            reads base reads aligned too.
        metrics: What each metric of its rows is, by name. No two terms of one loss may share a name.
        options: Class of its settings; must need no argument.
        sequence_loss: Loss of each sequence [S] from the sum over its rows of what `formula` gives [S], differentiable;
            called with an instance of `options` too. Absent, `formula` gives the losses of rows.
        torch_block: Fused version of `formula` for PyTorch; absent, autograd differentiates `formula`.
        triton: Fused version for CUDA; absent, PyTorch computes the rows there too.
    """

    name: str
    label: str
    description: str
    formula: Formula
    reads: tuple[Teacher, ...] | Callable[[Any], tuple[Teacher, ...]] = ("aligned",)
    metrics: Mapping[str, str] = field(default_factory=dict)
    options: type[Section] = Section
    sequence_loss: Callable[[Tensor, Any], Tensor] | None = None
    torch_block: BlockFunction | None = None
    triton: Callable[[RowLogits, Any], TermRows] | None = None

    def teachers(self, options: Any) -> tuple[Teacher, ...]:
        """Frozen models that its rows read under these options."""
        reads = self.reads(options) if callable(self.reads) else self.reads
        return ("aligned", "base") if "base" in reads else reads

    def add(self) -> None:
        """Enters the table unless it is there already: methods bring the same terms along again and again."""
        known = TERMS.get(self.name)
        if known is None or known.formula is not self.formula:
            register(self)

    @property
    def block_function(self) -> BlockFunction:
        """The fused function for PyTorch, or autograd around the formula."""
        return self.torch_block or _differentiated(self)


TERMS: dict[str, Term] = {}


def register(term: Term) -> Term:
    """Adds a term to the table."""
    if term.name in TERMS:
        raise ValueError(f"There is a loss term {term.name!r} already.")
    if taken := {"loss", "total"} & {term.name, *term.metrics}:
        raise ValueError(f"The name {taken.pop()!r} belongs to the whole loss.")
    TERMS[term.name] = term
    return term


def get(name: str) -> Term:
    """Looks up a term."""
    if name not in TERMS:
        raise ConfigError(f"There is no loss term {name!r}.", f"Known terms: {', '.join(sorted(TERMS))}.")
    return TERMS[name]


@dataclass(frozen=True, eq=False)
class ActiveTerm:
    """A term of one loss, with its options there."""

    term: Term
    options: Section
    weight: float

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Frozen models that its rows read."""
        return self.term.teachers(self.options)


def active_terms(settings: LossSettings) -> list[ActiveTerm]:
    """The terms of a loss, by their numbers."""
    found: list[ActiveTerm] = []
    taken: dict[str, str] = {}
    for name, weight in settings.weights.items():
        term = get(name)
        options = settings.options.get(name) or term.options()
        if not isinstance(options, term.options):
            raise ValueError(f"Options of the term {name!r} must be {term.options.__name__}, got {options!r}.")
        for metric in term.metrics:
            if taken.setdefault(metric, name) != name or metric in settings.weights:
                raise ValueError(f"The metric {metric!r} of the term {name!r} stands for something else already.")
        found.append(ActiveTerm(term, options, weight))
    return found


def _differentiated(term: Term) -> BlockFunction:
    """A block function from a plain formula: its gradient in the student's logits is taken by autograd."""

    def log_probs(product: Product | None) -> Tensor | None:
        if product is None:
            return None
        return torch.log_softmax(product.head.logits_of_product(product.product_CV), dim=-1)

    def function(block: Block, options: Any) -> TermRows:
        rows, student = block.logits, block.logits.student
        logits_RV = student.head.logits_of_product(student.product_CV).detach()
        aligned_RV, base_RV = log_probs(rows.aligned), log_probs(rows.base)
        with torch.set_grad_enabled(rows.gradient_CV is not None):
            logits_RV.requires_grad_(rows.gradient_CV is not None)
            found = term.formula(LogProbs(logits_RV.log_softmax(-1), aligned_RV, base_RV, rows.token_C), options)
        _check_result(term, found, len(logits_RV))
        if rows.gradient_CV is not None:
            gradient_RV = torch.zeros_like(logits_RV)
            if found.loss_R.requires_grad:
                (gradient_RV,) = torch.autograd.grad(found.loss_R, logits_RV, rows.factor_C)
            rows.gradient_CV.copy_(student.head.raw_gradient_(logits_RV.detach(), gradient_RV))
        return TermRows(found.loss_R.detach(), {name: value.detach() for name, value in found.metrics.items()})

    return function


def _check_result(term: Term, found: TermRows, num_rows: int) -> None:
    """Refuses what a formula may get wrong."""
    for what, values in {"the loss": found.loss_R, **found.metrics}.items():
        if tuple(values.shape) != (num_rows,):
            raise ValueError(f"The term {term.name!r} must give {what} as [{num_rows}], got {list(values.shape)}.")
    if found.metrics.keys() != term.metrics.keys():
        raise ValueError(
            f"The term {term.name!r} must give the metrics that it names ({', '.join(term.metrics)}), "
            f"got {', '.join(found.metrics)}."
        )


def divergence(rows: LogProbs, options: DivergenceSettings) -> TermRows:
    """T^2 D(q, p_s), with q of the aligned model or, contrastively, of aligned against base."""

    def at_temperature(log_p_NV: Tensor) -> Tensor:
        return torch.log_softmax(log_p_NV / options.temperature, dim=-1)

    log_student_NV, log_target_NV = at_temperature(rows.student_NV), at_temperature(rows.aligned_NV)
    alpha = options.contrastive.alpha
    if alpha > 0:
        aligned_NV, log_base_NV = log_target_NV.exp(), at_temperature(rows.base_NV)
        plausible_NV = aligned_NV >= options.contrastive.plausibility * aligned_NV.max(dim=-1, keepdim=True).values
        log_score_NV = log_target_NV + alpha * (log_target_NV - log_base_NV)
        log_target_NV = torch.log_softmax(log_score_NV.masked_fill(~plausible_NV, -torch.inf), dim=-1)
    if options.divergence == "forward_kl":
        loss_N = forward_kl(log_target_NV, log_student_NV)
    elif options.divergence == "reverse_kl":
        loss_N = forward_kl(log_student_NV, log_target_NV)
    else:
        mean_NV = (log_student_NV.exp() + log_target_NV.exp()) / 2
        log_mean_NV = mean_NV.masked_fill(mean_NV == 0, 1.0).log()  # forward_kl reads none of those
        loss_N = (forward_kl(log_target_NV, log_mean_NV) + forward_kl(log_student_NV, log_mean_NV)) / 2
    return TermRows(options.temperature**2 * loss_N)


def penalty(rows: LogProbs, options: PenaltySettings) -> TermRows:
    """sum over B_t of p_s(v)^2, with aligned at position 0 of its answer."""
    return TermRows((rows.student_NV.exp().square() * _favored(rows, options)).sum(dim=-1))


def _favored(rows: LogProbs, options: BaseFavoredSettings) -> Tensor:
    """B_t as 0 and 1 [R, V]; NaN where a teacher is, since a comparison with NaN would leave B_t empty."""
    favored_NV = base_favored_mask(rows.aligned_NV, rows.base_NV, options.tau, options.margin)
    is_nan_N1 = (rows.aligned_NV + rows.base_NV).isnan().any(dim=-1, keepdim=True)
    return favored_NV.to(rows.student_NV.dtype).masked_fill(is_nan_N1, torch.nan)


def nll(rows: LogProbs, options: Section) -> TermRows:
    """-log p_s of the token that follows."""
    return TermRows(-rows.student_NV.gather(1, rows.token_N[:, None])[:, 0])


def computed_in_pass(rows: LogProbs, options: Section) -> TermRows:
    """Stands where a term has no formula over log-probabilities, since its method's `StudentPass` computes it."""
    raise ValueError("This term is computed from the whole student, by the pass of its method.")


def _triton_divergence(logits: RowLogits, options: DivergenceSettings) -> TermRows:
    from raycomplete.losses import kernels  # Triton is not everywhere

    return kernels.divergence(logits, options)


def _divergence_reads(options: DivergenceSettings) -> tuple[Teacher, ...]:
    return ("aligned", "base") if options.contrastive.alpha > 0 else ("aligned",)


_fused: dict[str, Any] = {"reads": _divergence_reads, "torch_block": divergence_block, "triton": _triton_divergence}
for _name, _description, _options in (
    ("anchor", "from the aligned model along its own answers", DivergenceSettings),
    ("recovery", "from the aligned model's refusal after a compliant beginning", DivergenceSettings),
    (
        "push_forward",
        "along a compliant beginning from what the aligned model says to the prompt alone",
        PushForwardSettings,
    ),
):
    _about = f"divergence {_description}, in nats a token"
    register(Term(_name, _name.replace("_", "-"), _about, divergence, options=_options, **_fused))
register(
    Term(
        "penalty",
        "penalty",
        "squared probability of base-favored tokens along a compliant beginning",
        penalty,
        reads=("aligned", "base"),
        options=PenaltySettings,
    )
)
register(Term("opening", "opening", "-log p_s of the first tokens of a refusal, in nats a token", nll, reads=()))
register(Term("nll", "cross-entropy", "-log p_s of the token that follows, in nats a token", nll, reads=()))
