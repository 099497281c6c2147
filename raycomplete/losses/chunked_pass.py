"""The pass over token rows in chunks: matrix products on the way in, matrix products of the gradient on the way out.

Rows are sorted by term, those that read no teacher first and those that read base last, so that each chunk is a few
runs of one term, and a teacher's head is multiplied for the rows that read it only.
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raycomplete.losses.gradients import GradientSums
from raycomplete.losses.heads import Head, HiddenStates
from raycomplete.losses.settings import ChunkTokens, LossSettings
from raycomplete.losses.terms import ActiveTerm, Teacher
from raycomplete.losses.torch_rows import Product, RowLogits, TorchRows
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.machine import compiler_problem

if TYPE_CHECKING:
    from raycomplete.losses.loss import LossInputs

# Memory of one model's logits. On a CPU matrix products run at their full rate from about 256 rows on (measured at
# V 49152, H 576), so larger chunks buy nothing. On CUDA a chunk's products are so fast that reading and writing the
# whole [V, H] weight gradient once a chunk counts, so fewer are better.
_BUDGET_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
_MULTIPLE = 64  # of rows, and of the padded width of a row; tiles of matrix products stay full


def rows_per_chunk(
    chunk_tokens: ChunkTokens, vocab_size: int, logits_dtype: torch.dtype, device: torch.device, copies: int = 1
) -> int:
    """Resolves "auto" to as many rows as a fixed budget holds, with `copies` tensors like the logits for each model."""
    if chunk_tokens != "auto":
        if chunk_tokens < 1:
            raise ValueError(f'chunk_tokens must be at least 1, or "auto", got {chunk_tokens}.')
        return chunk_tokens
    budget = _BUDGET_BYTES.get(device.type, _BUDGET_BYTES["cpu"])
    rows = budget // (vocab_size * logits_dtype.itemsize * copies)
    return max(rows // _MULTIPLE * _MULTIPLE, min(rows, _MULTIPLE), 1)


def even_chunks(num_rows: int, limit: int) -> list[slice]:
    """Cuts rows into as few chunks of at most `limit` as possible, of nearly equal size.

    A short last chunk would pay for a whole pass over the head and its gradient.
    """
    if num_rows == 0:
        return []
    size = -(-num_rows // -(-num_rows // limit))
    size = min(limit, -(-size // _MULTIPLE) * _MULTIPLE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def wants_triton(student: Head, settings: LossSettings) -> bool:
    """Decides whether Triton computes the terms that it can; "auto" never fails."""
    obstacle = _obstacle_to_triton(student)
    if settings.backend == "triton" and obstacle is not None:
        raise SetupError(f'The backend is "triton", but {obstacle}.', 'Use "auto" or "torch".')
    return settings.backend == "triton" or (
        settings.backend == "auto" and student.weight_VH.is_cuda and obstacle is None
    )


def _obstacle_to_triton(student: Head) -> str | None:
    if student.logits_dtype == torch.float64:
        return "the student's head is float64, and the kernels sum in float32"
    if find_spec("triton") is None:
        return "triton is not installed"
    if student.weight_VH.is_cuda:
        return compiler_problem() or None
    from raycomplete.losses.kernels import INTERPRETED

    return None if INTERPRETED else f"the student is on {student.weight_VH.device.type}, not on a CUDA device"


def chunked_pass(
    inputs: LossInputs, terms: list[ActiveTerm], factor_N: Tensor, settings: LossSettings
) -> tuple[Tensor, dict[str, Tensor], GradientSums]:
    """Computes unweighted losses of all rows [N], metrics of rows by term, and gradients of factor * losses."""
    gradients = GradientSums(inputs.student.hidden_NH, inputs.student.head, factor_N.dtype)
    with torch.no_grad():
        work = _Pass(inputs, terms, factor_N, settings, gradients)
        for rows in work.chunks:
            work.take(rows)
        row_loss_N = torch.empty_like(factor_N)
        row_loss_N[work.order_N] = work.row_loss_N
        return row_loss_N, {name: torch.cat(parts) for name, parts in work.metrics.items()}, gradients


class _TeacherProducts:
    """One frozen model's products with its head, for the sorted rows from `first` on."""

    def __init__(self, states: HiddenStates, reads_N: Tensor, order_N: Tensor, max_rows: int, pad: bool) -> None:
        self.states = states
        num_rows, num_read = len(reads_N), int(reads_N.sum())
        self.first = num_rows - num_read
        self.row_N = (reads_N.cumsum(0) - 1)[order_N]
        self.product_CV = _buffer(states.hidden_NH, min(max_rows, num_read), states.head, pad)
        self.start = 0

    def multiply(self, rows: slice) -> None:
        """Computes the products of those rows of a chunk that read the model."""
        self.start = max(rows.start, self.first)
        if self.start < rows.stop:
            hidden_CH = self.states.hidden_NH[self.row_N[self.start : rows.stop]]
            _product(hidden_CH, self.states.head, self.product_CV)

    def of(self, rows: slice) -> Product:
        """The products of rows within the chunk."""
        return Product(self.product_CV[rows.start - self.start : rows.stop - self.start], self.states.head)


class _Pass:
    """Buffers of one pass. Rows are counted in sorted order here; `order_N` leads back."""

    def __init__(
        self,
        inputs: LossInputs,
        terms: list[ActiveTerm],
        factor_N: Tensor,
        settings: LossSettings,
        gradients: GradientSums,
    ) -> None:
        self.student = HiddenStates(inputs.student.hidden_NH.detach(), inputs.student.head.detach())
        self.settings, self.gradients = settings, gradients
        numbers = sorted(range(len(terms)), key=lambda number: (len(terms[number].teachers), number))
        self.terms = [terms[number] for number in numbers]
        place_T = torch.tensor(numbers, device=factor_N.device).argsort()
        place_N = place_T[inputs.term_N.long()]
        self.order_N = place_N.argsort(stable=True)
        counts = [int((place_N == place).sum()) for place in range(len(terms))]
        self.ends = [sum(counts[: place + 1]) for place in range(len(terms))]
        self.factor_N = factor_N[self.order_N]
        self.token_N = None if inputs.token_N is None else inputs.token_N[self.order_N]
        self.row_loss_N = torch.empty_like(self.factor_N)
        self.metrics = {name: [factor_N.new_empty(0)] for item in terms for name in item.term.metrics}

        num_rows, head = len(factor_N), self.student.head
        limit = rows_per_chunk(settings.chunk_tokens, head.vocab_size, head.weight_VH.dtype, factor_N.device)
        self.chunks = even_chunks(num_rows, limit)
        self.max_rows = max((rows.stop - rows.start for rows in self.chunks), default=0)
        self.use_triton = wants_triton(head, settings)
        self.student_CV = _buffer(factor_N, self.max_rows, head, self.use_triton)
        self.teachers: dict[Teacher, _TeacherProducts] = {}
        for role, states in inputs.teachers.items():
            reads_N = inputs.reads(terms, role)
            self.teachers[role] = _TeacherProducts(states, reads_N, self.order_N, self.max_rows, self.use_triton)
        self.gradient_CV = self.student_CV if gradients.wanted else None  # overwrites the logits that it was made of

    @cached_property
    def torch_rows(self) -> TorchRows:
        """The PyTorch backend; its buffers are made where a term needs it only."""
        heads = [teacher.states.head for teacher in self.teachers.values()]
        return TorchRows(self.student.head, heads, self.max_rows)

    def take(self, rows: slice) -> None:
        """Computes losses, metrics and gradients of one chunk."""
        index_C = self.order_N[rows]
        hidden_CH = self.student.hidden_NH[index_C].to(self.student.head.weight_VH.dtype)
        _product(hidden_CH, self.student.head, self.student_CV)
        for teacher in self.teachers.values():
            teacher.multiply(rows)
        start = rows.start
        for place, end in enumerate(self.ends):
            stop = min(end, rows.stop)
            if start < stop:
                self._run(place, slice(start, stop), rows.start)
                start = stop
        if self.gradient_CV is not None:
            self.gradients.add(index_C, hidden_CH, self.gradient_CV[: len(index_C)])

    def _run(self, place: int, rows: slice, first: int) -> None:
        """One run of rows of a term, in the chunk that starts at row `first`."""
        active, inside = self.terms[place], slice(rows.start - first, rows.stop - first)
        read = {role: self.teachers[role].of(rows) for role in active.teachers}
        logits = RowLogits(
            student=Product(self.student_CV[inside], self.student.head),
            aligned=read.get("aligned"),
            base=read.get("base"),
            factor_C=self.factor_N[rows],
            gradient_CV=None if self.gradient_CV is None else self.gradient_CV[inside],
            token_C=None if self.token_N is None else self.token_N[rows],
        )
        term = active.term
        if self.use_triton and term.triton is not None:
            found = term.triton(logits, active.options)
        else:
            found = self.torch_rows.run(term.block_function, active.options, logits)
        self.row_loss_N[rows] = found.loss_R
        for name, values in found.metrics.items():
            self.metrics[name].append(values)


def _buffer(like: Tensor, num_rows: int, head: Head, pad: bool) -> Tensor:
    """Makes an empty [num_rows, V] in the head's dtype; padded, its rows are a multiple of 64 apart.

    A vocabulary like Qwen's 151669 would start every second row at an odd address: kernels could load no more than two
    bytes at a time, and cuBLAS would take its slow path.
    """
    width = -(-head.vocab_size // _MULTIPLE) * _MULTIPLE if pad else head.vocab_size
    return like.new_empty(num_rows, width, dtype=head.weight_VH.dtype)[:, : head.vocab_size]


def _product(hidden_CH: Tensor, head: Head, out_CV: Tensor) -> None:
    """Writes hidden @ weight^T, in the weight's dtype, into the first rows of a buffer."""
    torch.mm(hidden_CH.to(head.weight_VH.dtype), head.weight_VH.T, out=out_CV[: len(hidden_CH)])
