"""Terms of the loss in Triton: one program a row, up to three sweeps over its vocabulary, every sum in float32.

The first sweep takes the normalisers of all models online, the second the sums that a gradient needs, the third writes
the gradient over the student's logits, in the dtype of the matrix products that follow. The formulas are those of
`divergences` and `torch_rows`. A row is read again rather than kept, because three rows of 128k tokens fit no register
file: some 20 bytes a token and model, beside the 10 H multiplications that a token costs in matrix products.

NaN and infinity of any model reach the row loss, where the caller looks for them. On a device a comparison with NaN is
false and a maximum drops it, so cases of probability 0 are told by equality and bounds set by `tl.where`.

Runs on CUDA, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of its functions types of its own; annotations there mean compile-time constants.

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from raycomplete.losses.settings import Divergence, DivergenceSettings
from raycomplete.losses.torch_rows import Product, RowLogits, TermRows

INTERPRETED: bool = triton.knobs.runtime.interpret

_FORMULAS: dict[Divergence, int] = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_MAX_TILE = 2048  # tokens; 8 a thread, so that bfloat16 loads are 16 bytes and two programs share a multiprocessor
_ROUNDING_NATS = tl.constexpr(1e-5)  # of log-probabilities in float32, beside what large logits lose
_ROUNDING_OF_LOGITS = tl.constexpr(1.2e-7)  # 2^-23, relative


@triton.jit
def _logits(model, row, tokens, inside):
    """Logits of a tile in float32, -inf outside the vocabulary.

    Rows are padded to a multiple of 64 (`chunked_pass`): loads that end with the stride, not with the vocabulary, are
    16 bytes wide whatever V is.
    """
    product_ptr, stride, bias_ptr, scale, softcap = model
    logits = tl.load(product_ptr + row * stride + tokens, mask=tokens < stride, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if softcap is not None:
        logits = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap)))  # tanh, which Triton lacks
    return tl.where(inside, logits, -float("inf"))


@triton.jit
def _lanes(TILE: tl.constexpr):
    """A running maximum and a running sum of exponentials for each lane: nothing crosses lanes before the row ends."""
    return tl.full([TILE], -float("inf"), dtype=tl.float32), tl.zeros([TILE], dtype=tl.float32)


@triton.jit
def _online(largest, total, logits):
    """Takes a tile into the lanes, with one exponential a token: of two values only the smaller one needs it."""
    fall = tl.exp(tl.where(largest == logits, 0.0, -tl.abs(largest - logits)))  # equal may be -inf - -inf, NaN
    added = tl.where(logits == -float("inf"), 0.0, fall)
    return tl.maximum(largest, logits), tl.where(logits > largest, total * fall + 1.0, total + added)


@triton.jit
def _over_lanes(largest, total):
    """Largest value, and log of the sum of exponentials of values less that: together they lose digits."""
    row_largest = tl.max(largest, axis=0)
    shift = tl.where(row_largest == -float("inf"), 0.0, row_largest)
    return row_largest, tl.log(tl.sum(total * tl.exp(largest - shift), axis=0))


@triton.jit
def _norm(model, row, vocab_size, inverse_temperature, TILE: tl.constexpr):
    """Largest logit over temperature, and log of the normaliser less that."""
    largest, total = _lanes(TILE)
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = _logits(model, row, tokens, tokens < vocab_size)
        largest, total = _online(largest, total, logits * inverse_temperature)
    return _over_lanes(largest, total)


@triton.jit
def _contrast(log_aligned, log_base, floor, alpha, inside):
    """Unnormalised log q of the contrastive teacher."""
    plausible = inside & (log_aligned >= floor)
    aligned = tl.where(plausible, log_aligned, 0.0)
    base = tl.where(log_base < -1e30, -1e30, log_base)  # stands in for log 0, as in `divergences`
    base = tl.where(plausible, base, 0.0)
    return tl.where(plausible, aligned + alpha * (aligned - base), -float("inf"))


@triton.jit
def _log_mean_ratios(log_p, log_q, p, q):
    """log(p / m) and log(q / m), 0 where both are 0."""
    ratio = tl.where((p == 0.0) & (q == 0.0), 0.0, log_p - log_q)
    ratio = tl.minimum(tl.maximum(ratio, -200.0), 200.0)
    p_ratio = 0.6931471805599453 + tl.minimum(ratio, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(ratio)))
    return p_ratio, p_ratio - ratio


@triton.jit
def _store_gradient(gradient_ptr, gradient, logits, model, tokens, stride):
    """Chain rule from logits to the matrix product; what lands in the padding of a row is never read."""
    _, _, _, scale, softcap = model
    if softcap is not None:
        tanh = logits / softcap
        gradient *= 1.0 - tanh * tanh
    tl.store(gradient_ptr + tokens, (gradient * scale).to(gradient_ptr.dtype.element_ty), mask=tokens < stride)


@triton.jit(do_not_specialize_on_alignment=["factor_ptr"])
def _divergence_kernel(
    student,
    aligned,
    base,
    gradient_ptr,
    gradient_stride,
    factor_ptr,
    loss_ptr,
    vocab_size,
    temperature,
    alpha,
    log_plausibility,
    FORMULA: tl.constexpr,
    CONTRASTIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * vocabulary passes 2^31
    inverse = 1.0 / temperature
    student_max, student_norm = _norm(student, row, vocab_size, inverse, TILE)
    aligned_max, aligned_norm = _norm(aligned, row, vocab_size, inverse, TILE)
    base_max, base_norm, floor, target_max, target_norm = 0.0, 0.0, 0.0, 0.0, 0.0
    if CONTRASTIVE:
        base_max, base_norm = _norm(base, row, vocab_size, inverse, TILE)
        # Devices contract product and difference of a sweep, not of the maximum: without slack the best token itself
        # may fall below the floor at plausibility 1.
        slack = _ROUNDING_NATS + _ROUNDING_OF_LOGITS * tl.abs(aligned_max)
        floor = log_plausibility - aligned_norm - slack
        lanes_max, lanes_total = _lanes(TILE)
        for start in range(0, vocab_size, TILE):
            tokens = start + tl.arange(0, TILE)
            inside = tokens < vocab_size
            log_aligned = _logits(aligned, row, tokens, inside) * inverse - aligned_max - aligned_norm
            log_base = _logits(base, row, tokens, inside) * inverse - base_max - base_norm
            log_q = _contrast(log_aligned, log_base, floor, alpha, inside)
            lanes_max, lanes_total = _online(lanes_max, lanes_total, log_q)
        target_max, target_norm = _over_lanes(lanes_max, lanes_total)

    factor = tl.load(factor_ptr + row) * temperature  # T^2 of the loss, 1 / T of the chain rule
    p_part = tl.zeros([TILE], dtype=tl.float32)
    q_part = tl.zeros([TILE], dtype=tl.float32)
    p_mean = 0.0
    # Forward KL needs no sum before its gradient: it takes both in one sweep.
    for sweep in tl.static_range(2):
        if (sweep == 0 and FORMULA != 0) or (sweep == 1 and (FORMULA == 0 or gradient_ptr is not None)):
            for start in range(0, vocab_size, TILE):
                tokens = start + tl.arange(0, TILE)
                inside = tokens < vocab_size
                logits = _logits(student, row, tokens, inside)
                log_p = logits * inverse - student_max - student_norm
                log_q = _logits(aligned, row, tokens, inside) * inverse - aligned_max - aligned_norm
                if CONTRASTIVE:
                    log_base = _logits(base, row, tokens, inside) * inverse - base_max - base_norm
                    log_q = _contrast(log_q, log_base, floor, alpha, inside) - target_max - target_norm
                p, q = tl.exp(log_p), tl.exp(log_q)
                if FORMULA == 0:
                    q_part += tl.where(q == 0.0, 0.0, q * (log_q - log_p))
                    gradient = p - q
                elif FORMULA == 1:
                    ratio = tl.where(p == 0.0, 0.0, log_p - log_q)
                    if sweep == 0:
                        p_part += p * ratio
                    gradient = p * (ratio - p_mean)
                else:
                    p_ratio, q_ratio = _log_mean_ratios(log_p, log_q, p, q)
                    if sweep == 0:
                        p_part += p * p_ratio
                        q_part += q * q_ratio
                    gradient = 0.5 * p * (p_ratio - p_mean)
                if sweep == 1 and gradient_ptr is not None:
                    out_ptr = gradient_ptr + row * gradient_stride
                    _store_gradient(out_ptr, gradient * factor, logits, student, tokens, gradient_stride)
        if sweep == 0:
            p_mean = tl.sum(p_part, axis=0)
    loss = p_mean + tl.sum(q_part, axis=0)
    if FORMULA == 2:
        loss *= 0.5
    tl.store(loss_ptr + row, loss * temperature * temperature)


def divergence(logits: RowLogits, options: DivergenceSettings) -> TermRows:
    """Computes T^2 D(q, p_s) [C], and writes the gradient; for heads in bfloat16, float16 or float32."""
    contrastive = options.contrastive
    loss_C, gradient_CV = torch.empty_like(logits.factor_C), logits.gradient_CV
    tile = min(_MAX_TILE, triton.next_power_of_2(logits.student.head.vocab_size))
    with torch.cuda.device_of(loss_C):
        _divergence_kernel[(len(loss_C),)](
            _model(logits.student),
            _model(logits.aligned),
            _model(logits.base),
            gradient_CV,
            0 if gradient_CV is None else gradient_CV.stride(0),
            logits.factor_C,
            loss_C,
            logits.student.head.vocab_size,
            options.temperature,
            contrastive.alpha,
            math.log(contrastive.plausibility),
            FORMULA=_FORMULAS[options.divergence],
            CONTRASTIVE=contrastive.alpha > 0,
            TILE=tile,
            num_warps=max(1, tile // 256),
            enable_fp_fusion=True,  # as it always was; Triton 3.10 would no longer let products and sums contract
        )
    return TermRows(loss_C)


def _model(product: Product | None) -> tuple[Any, ...] | None:
    """Arguments of `_logits` for a model; kernels compile apart for heads with and without bias and softcap."""
    if product is None:
        return None
    product_CV, head = product.product_CV, product.head
    softcap = None if head.softcap is None else float(head.softcap)
    return product_CV, product_CV.stride(0), head.bias_V, float(head.scale), softcap
