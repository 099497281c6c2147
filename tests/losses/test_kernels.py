"""The Triton backend against PyTorch: on a CUDA device (marked gpu), and here under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.losses import Head, HiddenStates, LossInputs, distillation_loss
from raycomplete.losses.reference import reference_loss
from raycomplete.runtime.errors import NotFiniteError, SetupError
from tests.losses.conftest import ANCHOR, NUMBERS, PUSH_FORWARD, loss_settings, named

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Rows of logits are padded for Triton alone, and cuBLAS may take another kernel for each width.
SAME_PRODUCTS = 1e-5 if INTERPRETED else 1e-4

HEADS = [{}, {"bias": True, "scale": 2.0, "softcap": 3.0}]
DIVERGENCES = [
    ("forward_kl", "jsd", 0.0),
    ("reverse_kl", "forward_kl", 0.0),
    ("forward_kl", "jsd", 0.7),
    ("jsd", "forward_kl", 0.7),
]


def test_the_interpreter_runs_the_tests_below() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not large", "-W", "ignore", str(__file__)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is what makes this possible")
def test_triton_without_cuda_is_refused_and_auto_takes_pytorch(make_case: Any) -> None:
    with pytest.raises(SetupError, match="not on a CUDA device"):
        make_case(dtype=torch.float32, backend="triton").run(distillation_loss)
    assert torch.equal(
        make_case().run(distillation_loss).total, make_case(backend="torch").run(distillation_loss).total
    )


def _pair(make_case: Any, **arguments: Any) -> tuple[Any, Any]:
    small = {"num_rows": 8, "chunk_tokens": 5}  # the interpreter takes milliseconds a row
    both = [make_case(**{**small, **arguments}, backend=name) for name in ("triton", "torch")]
    return _to_device(both[0]), _to_device(both[1])


@pytest.fixture
def cases(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two equal cases: for Triton in tiles much smaller than the vocabulary, and for PyTorch, both on the device."""
    from raycomplete.losses import kernels

    monkeypatch.setattr(kernels, "_MAX_TILE", 16)
    return partial(_pair, make_case)


def _to_device(case: Any) -> Any:
    moved = {item.name: getattr(case, item.name) for item in fields(case)}
    for name, value in moved.items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        elif isinstance(value, Head):
            parts = [value.weight_VH, value.bias_V]
            weight_VH, bias_V = (
                None if part is None else part.detach().to(DEVICE).requires_grad_(part.requires_grad) for part in parts
            )
            moved[name] = replace(value, weight_VH=weight_VH, bias_V=bias_V)
    return replace(case, **moved)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float, label: str) -> None:
    error, norm = (actual.double().cpu() - expected.double().cpu()).norm(), expected.double().norm()
    assert float(error) <= relative * float(norm) + 1e-12, f"{label}: error {error:.3g}, norm {norm:.3g}"


def assert_same(triton: Any, torch_case: Any, loss: float, gradient: float, expected: Any = distillation_loss) -> None:
    output, wanted = named(triton.run(distillation_loss)), named(torch_case.run(expected))
    for name, values in output.items():
        assert_close(values, wanted[name], loss, name)
    for actual, other in zip(triton.gradients(distillation_loss), torch_case.gradients(expected), strict=True):
        assert_close(actual, other, gradient, "gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("divergences", DIVERGENCES)
@pytest.mark.parametrize("head", HEADS)
def test_float32_matches_the_reference(cases: Any, make_case: Any, head: Any, divergences: Any) -> None:
    anchor, recovery, alpha = divergences
    arguments = {"anchor_divergence": anchor, "recovery_divergence": recovery, "alpha": alpha, **head}
    triton, _ = cases(dtype=torch.float32, temperature=1.7, **arguments)
    plain = make_case(dtype=torch.float32, temperature=1.7, num_rows=8, chunk_tokens=5, **arguments)
    assert_same(triton, plain, 1e-5, 1e-5, reference_loss)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head", "divergences"), [(HEADS[1], DIVERGENCES[0]), *((HEADS[0], item) for item in DIVERGENCES)]
)
def test_bfloat16_matches_pytorch_on_the_same_products(cases: Any, head: Any, divergences: Any) -> None:
    # Both read the same rounded products, so losses agree as in float32; gradients are rounded once more by up to
    # 2^-8 (the interpreter cuts where devices round) before products that are rounded likewise.
    anchor, recovery, alpha = divergences
    arguments = {"anchor_divergence": anchor, "recovery_divergence": recovery, "alpha": alpha, **head}
    assert_same(*cases(dtype=torch.bfloat16, **arguments), SAME_PRODUCTS, 1e-2)


@pytest.mark.gpu
def test_excluded_tokens_and_padding_rows(cases: Any) -> None:
    pair = cases(dtype=torch.float32, bias=True, anchor_divergence="jsd")
    for case in pair:
        with torch.no_grad():
            for head in (case.student_head, case.aligned_head, case.base_head):
                head.bias_V[[3, 7]] = -torch.inf
        case.student_head, case.aligned_head, case.base_head = (
            head.rows(29) for head in (case.student_head, case.aligned_head, case.base_head)
        )
    outputs = [case.run(distillation_loss) for case in pair]
    for name, values in named(outputs[0]).items():
        assert_close(values, named(outputs[1])[name], 1e-5, name)
    leaves = [[case.student_hidden_NH, case.student_head.weight_VH, case.student_head.bias_V] for case in pair]
    grads = [torch.autograd.grad(output.total, leaf) for output, leaf in zip(outputs, leaves, strict=True)]
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted, 1e-5, "gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_extreme_logits(cases: Any, divergence: str) -> None:
    pair = cases(
        dtype=torch.float32, vocab_size=29, hidden_sizes=(12, 12, 12), anchor_divergence=divergence, num_rows=12
    )
    generator = torch.Generator().manual_seed(3)
    weights = [1e4 * torch.randint(-1, 2, (29, 12), generator=generator).float() for _ in range(3)]
    for case in pair:
        for head, weight_VH in zip((case.student_head, case.aligned_head, case.base_head), weights, strict=True):
            head.weight_VH.data = weight_VH.to(DEVICE)
        for hidden_NH in (case.student_hidden_NH, case.aligned_hidden_NH, case.base_hidden_NH):
            hidden_NH.data = torch.eye(12, device=DEVICE)
    assert_same(*pair, 1e-6, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [4099, 4112])  # rows that start at odd addresses, and rows that do not
@pytest.mark.parametrize("divergences", [*DIVERGENCES[:3], ("jsd", "reverse_kl", 0.0)])
def test_whole_tiles(make_case: Any, divergences: Any, vocab_size: int, dtype: torch.dtype) -> None:
    anchor, recovery, alpha = divergences
    arguments = {"anchor_divergence": anchor, "recovery_divergence": recovery, "alpha": alpha}
    pair = _pair(make_case, dtype=dtype, vocab_size=vocab_size, bias=True, num_rows=6, **arguments)
    assert_same(*pair, *((1e-5, 1e-5) if dtype == torch.float32 else (SAME_PRODUCTS, 1e-2)))


@pytest.mark.gpu
@pytest.mark.parametrize("term", list(NUMBERS))
@pytest.mark.parametrize("divergences", [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.0), ("jsd", 0.7)])
@pytest.mark.parametrize("model", ["student", "aligned", "base"])
def test_nan_of_any_head_reaches_the_row_loss(cases: Any, model: str, divergences: Any, term: int) -> None:
    divergence, alpha = divergences
    both = {"anchor_divergence": divergence, "recovery_divergence": divergence, "alpha": alpha}
    if model == "base" and (term == PUSH_FORWARD or not alpha):
        pytest.skip("these rows do not read base")
    for case in cases(dtype=torch.float32, num_rows=2, terms=[term] * 2, **both):
        with torch.no_grad():
            getattr(case, f"{model}_head").weight_VH[7] = torch.nan
        with pytest.raises(NotFiniteError, match=r"loss of the student .* 2 of 2 rows"):
            case.run(distillation_loss)


@pytest.mark.gpu
def test_the_likeliest_token_is_plausible_at_any_rounding(cases: Any) -> None:
    arguments = {"alpha": 0.7, "plausibility": 1.0, "temperature": 1.7, "scale": 300.0, "num_rows": 16}
    assert_same(*cases(dtype=torch.float32, **arguments), 1e-5, 1e-4)


@pytest.mark.gpu
def test_tokens_that_rounding_tells_apart_are_plausible_together(cases: Any) -> None:
    losses = []
    for distance in (0.0, 2e-6, 1e-3):
        case, _ = cases(dtype=torch.float32, num_rows=2, terms=[ANCHOR] * 2, bias=True, alpha=0.7, plausibility=1.0)
        case.aligned_head.bias_V.zero_()[1] = -distance
        case.aligned_head.weight_VH.zero_()
        case.aligned_head.bias_V[2:] = -5.0
        losses.append(case.run(distillation_loss).row_loss_N.detach())
    assert torch.allclose(losses[1], losses[0], rtol=1e-4)
    assert not torch.isclose(losses[2], losses[0], rtol=1e-2).any()


@pytest.mark.gpu
def test_large_heads_stay_within_four_gigabytes() -> None:
    rows, vocab_size, hidden_size = 8192, 128_256, 4096
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    hidden = [normal(rows, hidden_size) for _ in range(3)]
    heads = [Head(normal(vocab_size, hidden_size) / 64) for _ in range(3)]
    for leaf in (hidden[0], heads[0].weight_VH):
        leaf.requires_grad_()
    term_N, weight_N = torch.full((rows,), ANCHOR, device=DEVICE), torch.ones(rows, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    states = [HiddenStates(*pair) for pair in zip(hidden, heads, strict=True)]
    distillation_loss(LossInputs(*states, term_N, weight_N), loss_settings(alpha=0.5)).total.backward()
    gradients = sum(leaf.grad.nbytes for leaf in (hidden[0], heads[0].weight_VH) if leaf.grad is not None)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 4e9
