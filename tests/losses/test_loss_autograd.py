"""How the loss behaves inside a training step: what requires grad, memory, empty batches, ZeRO-3, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raycomplete.losses import Head, distillation_loss
from raycomplete.losses.reference import reference_loss
from raycomplete.runtime.errors import NotFiniteError
from tests.losses.conftest import loss_settings, named


class LargestTensor(TorchDispatchMode):
    """Notes the size of every tensor that any operation makes, inside autograd functions too; views do not count."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {item.untyped_storage().data_ptr() for item in tensors((args, kwargs))}
        made = [item.numel() for item in tensors(result) if item.untyped_storage().data_ptr() not in known]
        self.numel = max(self.numel, *made, 0)
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [item for item in tree_leaves(tree) if isinstance(item, torch.Tensor)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist(make_case, alpha, dtype):
    rows, vocab_size, chunk = 256, 400, 16
    case = make_case(num_rows=rows, vocab_size=vocab_size, chunk_tokens=chunk, alpha=alpha, dtype=dtype, bias=True)
    with LargestTensor() as fused:
        case.run(distillation_loss).total.backward()
    assert fused.numel <= chunk * vocab_size  # the largest of chunk*V, V*H and N*H here
    with LargestTensor() as plain:
        case.run(reference_loss)
    assert plain.numel >= rows * vocab_size  # so the recorder would have seen them


def test_a_frozen_head_costs_no_gradient_of_its_size(make_case):
    rows, vocab_size, hidden_size, chunk = 64, 400, 128, 16
    for frozen in (True, False):
        case = make_case(
            num_rows=rows,
            vocab_size=vocab_size,
            hidden_sizes=(hidden_size, 6, 5),
            chunk_tokens=chunk,
            dtype=torch.float32,
        )
        case.student_head.weight_VH.requires_grad_(not frozen)
        with LargestTensor() as made:
            case.run(distillation_loss).total.backward()
        assert (made.numel < vocab_size * hidden_size) == frozen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_size_of_block_and_slab_gives_the_same(make_case, dtype, monkeypatch):
    arguments = {"dtype": dtype, "bias": True, "softcap": 3.0, "chunk_tokens": 16}
    whole = make_case(**arguments)
    expected, gradients = named(whole.run(distillation_loss)), whole.gradients(distillation_loss)
    monkeypatch.setattr("raycomplete.losses.torch_rows._BLOCK_BYTES", {"cpu": 3 * 31 * 8})
    monkeypatch.setattr("raycomplete.losses.gradients._SLAB_BYTES", {"cpu": 100})
    case = make_case(**arguments)
    for name, values in named(case.run(distillation_loss)).items():
        torch.testing.assert_close(values, expected[name], msg=name)
    for actual, wanted in zip(case.gradients(distillation_loss), gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_only_gradients_are_kept_for_backward(make_case):
    case = make_case(num_rows=256, vocab_size=400, chunk_tokens=16, bias=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda item: saved.append(item.numel()) or item, lambda item: item):
        case.run(distillation_loss)
    assert sum(saved) == sum(leaf.numel() for leaf in case.leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_only_where_required(make_case, wanted):
    full = make_case(bias=True)
    expected = full.gradients(distillation_loss)
    case = make_case(bias=True)
    for position, leaf in enumerate(case.leaves):
        leaf.requires_grad_(position in wanted)
    for position, grad in zip(wanted, case.gradients(distillation_loss), strict=True):
        assert torch.equal(grad, expected[position])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_loss_without_a_graph(make_case, mode):
    case = make_case()
    with mode():
        output = case.run(distillation_loss)
    assert not output.total.requires_grad
    assert torch.equal(output.total, case.run(distillation_loss).total.detach())


def test_backward_scales_and_can_be_repeated(make_case):
    case = make_case()
    total = case.run(distillation_loss).total
    once = torch.autograd.grad(total, case.leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * total, case.leaves)
    for single, triple in zip(once, thrice, strict=True):
        assert torch.allclose(3 * single, triple, rtol=1e-14)


def test_second_derivatives_are_refused_rather_than_wrong(make_case):
    case = make_case()
    (grad,) = torch.autograd.grad(case.run(distillation_loss).total, case.leaves[:1], create_graph=True)
    assert not grad.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("loss", [distillation_loss, reference_loss])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_empty_batch(make_case, alpha, loss):
    case = make_case(num_rows=0, bias=True, alpha=alpha)
    total = case.run(loss).total
    assert total.item() == 0
    assert total.requires_grad
    grads = torch.autograd.grad(total, case.leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in case.leaves]
    assert not any(grad.any() for grad in grads)


def test_head_tied_to_the_embedding(make_case):
    case = make_case(hidden_sizes=(8, 6, 5))
    weight_VH = torch.nn.Parameter(case.student_head.weight_VH.detach().clone())
    tokens_N = torch.arange(23) % 31
    grads = []
    for loss in (distillation_loss, reference_loss):
        case.student_hidden_NH, case.student_head = torch.tanh(weight_VH[tokens_N]), Head(weight_VH)
        grads.append(torch.autograd.grad(case.run(loss).total, weight_VH)[0])
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-13)


def test_padding_rows_of_the_head_get_zero_gradient(make_case):
    case = make_case(vocab_size=31)
    weight_VH = torch.nn.Parameter(torch.cat([case.student_head.weight_VH.detach(), torch.ones(5, 8).double()]))
    expected = case.gradients(distillation_loss)[1]
    case.student_head = Head(weight_VH).rows(31)
    case.run(distillation_loss).total.backward()
    assert torch.equal(weight_VH.grad[:31], expected)
    assert not weight_VH.grad[31:].any()


def test_backward_never_reads_the_head_weight(make_case):
    # As under ZeRO-3: partitioned again after forward, gathered (here with garbage) only so that autograd accepts its
    # shape.
    case = make_case()
    expected = case.gradients(distillation_loss)
    weight_VH = torch.nn.Parameter(case.student_head.weight_VH.detach().clone())
    case.student_head = Head(weight_VH)
    total = case.run(distillation_loss).total
    weight_VH.data = torch.empty(0, dtype=torch.float64)
    total.register_hook(lambda grad: setattr(weight_VH, "data", torch.full((31, 8), torch.nan).double()))
    total.backward()
    assert torch.equal(weight_VH.grad, expected[1])


def test_autocast_around_the_loss_changes_nothing(make_case):
    case = make_case(dtype=torch.float32)
    expected = case.gradients(distillation_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = case.run(distillation_loss).total
    assert total.dtype == torch.float32
    assert all(map(torch.equal, torch.autograd.grad(total, case.leaves), expected))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("field", "name"),
    [("student_hidden_NH", "student"), ("aligned_hidden_NH", "aligned"), ("weight_N", "weight")],
)
def test_bad_numbers_are_named_with_their_row(make_case, field, name, bad):
    case = make_case()
    with torch.no_grad():
        getattr(case, field)[[5, 9]] = bad
    with pytest.raises(NotFiniteError, match=f"{name}.* 2 of 23 rows, first in row 5"):
        case.run(distillation_loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_N": torch.zeros(23, 1)}, r"weight must be \[23\]"),
        ({"term_N": torch.full((23,), 3)}, "0 anchor, 1 recovery, 2 push_forward"),
        ({"term_N": torch.zeros(23)}, "0 anchor, 1 recovery, 2 push_forward"),
        ({"token_N": torch.zeros(22, dtype=torch.long)}, r"token must be \[23\]"),
        ({"student_hidden_NH": torch.zeros(23, 7).double()}, r"student hidden must be \[23, 8\]"),
        ({"aligned_hidden_NH": torch.zeros(22, 6).double()}, r"aligned hidden must be \[23, 6\]"),
        ({"base_hidden_NH": torch.zeros(23, 9).double()}, r"base hidden must be \[16, 5\]"),
        ({"base_head": Head(torch.zeros(30, 5).double())}, "student 31, aligned 31, base 30"),
        ({"student_head": Head(torch.zeros(31, 8).half())}, "float16"),
    ],
)
def test_what_does_not_fit_is_refused(make_case, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_case(alpha=0.5), **change).run(distillation_loss)


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"push_temperature": 0}, "temperature"),
        ({"alpha": -1}, "alpha"),
        ({"chunk_tokens": 0}, "chunk_tokens must"),
        ({"plausibility": 0}, "plausibility"),
        ({"temperature": 0}, "temperature"),
        ({"alpha": 0.5, "anchor_divergence": "reverse_kl"}, "reverse_kl must not meet a contrastive teacher"),
        ({"alpha": 0.5, "recovery_divergence": "reverse_kl"}, "reverse_kl must not meet a contrastive teacher"),
    ],
)
def test_settings_out_of_range_are_refused(bad, key):
    with pytest.raises(ValueError, match=key):
        loss_settings(**bad)
