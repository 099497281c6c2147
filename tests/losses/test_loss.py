"""The loss and its gradients against the float64 reference, identities, and how it behaves inside a training step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raycomplete.losses import Head, HiddenStates, LossInputs, distillation_loss
from raycomplete.losses.reference import reference_loss
from raycomplete.runtime.errors import NotFiniteError
from tests.losses.conftest import NUMBERS, PUSH_FORWARD, RECOVERY, loss_settings, named

HEADS = [{}, {"bias": True}, {"scale": 0.5}, {"softcap": 1.5}, {"bias": True, "scale": 2.0, "softcap": 3.0}]


def assert_close(actual: Tensor, expected: Tensor, relative: float, label: str = "") -> None:
    """Norm of the difference within `relative` of the norm of the expectation."""
    assert actual.shape == expected.shape, label
    error, norm = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    assert error <= relative * norm + 1e-12, f"{label}: error {error:.3g}, norm {norm:.3g}"


def assert_like_reference(case, loss_relative: float, gradient_relative: float) -> None:
    output, expected = named(case.run(distillation_loss)), named(case.run(reference_loss))
    assert output.keys() == expected.keys()
    for name, values in output.items():
        assert_close(values, expected[name], loss_relative, name)
    for actual, wanted in zip(case.gradients(distillation_loss), case.gradients(reference_loss), strict=True):
        assert_close(actual, wanted, gradient_relative, "gradient")


# Divergence of anchor rows, of recovery rows, alpha: reverse KL and a contrastive teacher exclude each other.
DIVERGENCES = [
    ("forward_kl", "jsd", 0.0),
    ("reverse_kl", "forward_kl", 0.0),
    ("jsd", "reverse_kl", 0.0),
    ("forward_kl", "jsd", 0.7),
    ("jsd", "forward_kl", 0.7),
]


def divergence_settings(anchor: str, recovery: str, alpha: float) -> dict:
    return {"anchor_divergence": anchor, "recovery_divergence": recovery, "alpha": alpha}


@pytest.mark.parametrize("divergences", DIVERGENCES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_matches_the_reference(make_case, dtype, relative, head, divergences):
    settings = divergence_settings(*divergences)
    case = make_case(dtype=dtype, temperature=1.7, **settings, **head)
    assert_like_reference(case, relative, relative)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_matches_the_reference_within_its_rounding(make_case, head):
    # The reference reads the same bfloat16 inputs. bfloat16 keeps 8 bits, so each product is rounded by up to 2^-9:
    # with logits up to about 5 before scale, that is .01 absolute on a logit of each model, 1 % on a probability.
    # Rounding is random over the vocabulary, so sums come out below: over 20 seeds the worst was .7 % on a gradient,
    # .5 % on a loss.
    case = make_case(num_rows=60, vocab_size=200, dtype=torch.bfloat16, **head)
    assert_like_reference(case, 2e-2, 2e-2)


def test_bfloat16_hidden_with_float32_heads_loses_only_the_rounding_of_the_gradient(make_case):
    case = make_case(dtype=torch.float32, hidden_dtype=torch.bfloat16)
    output, expected = case.run(distillation_loss), case.run(reference_loss)
    assert_close(output.total.detach(), expected.total.detach(), 1e-5)
    (hidden, weight), (hidden_reference, weight_reference) = (
        case.gradients(distillation_loss),
        case.gradients(reference_loss),
    )
    assert hidden.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert_close(hidden, hidden_reference, 2**-8)  # both sides round each entry once, by up to 2^-9
    assert_close(weight, weight_reference, 1e-5)


@pytest.mark.parametrize("divergences", DIVERGENCES)
@pytest.mark.parametrize("head", [HEADS[0], HEADS[-1]])
def test_gradcheck(make_case, head, divergences):
    settings = divergence_settings(*divergences)
    case = make_case(
        num_rows=6, vocab_size=4, hidden_sizes=(2, 2, 4), chunk_tokens=4, temperature=0.6, **settings, **head
    )

    def total(hidden_NH: Tensor, weight_VH: Tensor, *bias_V: Tensor) -> Tensor:
        case.student_hidden_NH = hidden_NH
        case.student_head = Head(weight_VH, *(bias_V or (None,)), case.student_head.scale, case.student_head.softcap)
        return case.run(distillation_loss).total

    assert torch.autograd.gradcheck(total, tuple(case.leaves))


@st.composite
def case_arguments(draw):
    terms = draw(st.lists(st.sampled_from(list(NUMBERS)), max_size=9))
    weights = st.one_of(st.just(0.0), st.floats(1e-3, 10))
    return {
        "num_rows": len(terms),
        "terms": terms,
        "weights": draw(st.lists(weights, min_size=len(terms), max_size=len(terms))),
        "vocab_size": draw(st.integers(1, 12)),
        "hidden_sizes": tuple(draw(st.integers(1, 5)) for _ in range(3)),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.25, 3.0])),
        "softcap": draw(st.sampled_from([None, 0.5, 4.0])),
        **divergence_settings(*draw(st.sampled_from(DIVERGENCES))),
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.5])),
        "plausibility": draw(st.sampled_from([0.01, 0.1, 1.0])),
        "push_temperature": draw(st.sampled_from([0.5, 1.0, 4.0])),
        "push_forward": draw(st.sampled_from([0.0, 1.0])),
        "chunk_tokens": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 10_000)),
    }


@given(arguments=case_arguments())
@hypothesis_settings(max_examples=120, deadline=None, derandomize=True)
def test_matches_the_reference_for_any_shape_term_and_weight(make_case, arguments):
    assert_like_reference(make_case(**arguments), 1e-10, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("divergence", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.0), ("jsd", 0.5)]
)
def test_extreme_logits_stay_finite_and_right(make_case, dtype, divergence, alpha):
    # Hidden rows are unit vectors, so logits are entries of the head weight: -1e4, 0 or 1e4, ties included.
    settings = divergence_settings(divergence, "forward_kl", alpha)
    case = make_case(num_rows=12, vocab_size=9, hidden_sizes=(12, 12, 12), dtype=dtype, **settings)
    generator = torch.Generator().manual_seed(3)
    for head in (case.student_head, case.aligned_head, case.base_head):
        head.weight_VH.data = 1e4 * torch.randint(-1, 2, (9, 12), generator=generator).to(dtype)
    for hidden_NH in (case.student_hidden_NH, case.aligned_hidden_NH, case.base_hidden_NH):
        hidden_NH.data = torch.eye(12, dtype=dtype)
    assert case.run(distillation_loss).row_loss_N.max() > 5e3
    assert all(bool(grad.isfinite().all()) for grad in case.gradients(distillation_loss))
    assert_like_reference(case, 1e-5, 1e-5)


@pytest.mark.parametrize("divergences", DIVERGENCES)
def test_tokens_that_every_model_excludes_change_nothing(make_case, divergences):
    settings = divergence_settings(*divergences)
    case, banned = make_case(bias=True, **settings), make_case(bias=True, **settings)
    with torch.no_grad():
        for head in (banned.student_head, banned.aligned_head, banned.base_head):
            head.bias_V[[3, 7]] = -torch.inf
    kept = [token for token in range(31) if token not in (3, 7)]
    for name in ("student_head", "aligned_head", "base_head"):
        head = getattr(case, name)
        weight_VH, bias_V = head.weight_VH.detach()[kept], head.bias_V.detach()[kept]
        grad = name == "student_head"
        setattr(case, name, Head(weight_VH.requires_grad_(grad), bias_V.requires_grad_(grad)))
    assert_close(banned.run(distillation_loss).row_loss_N, case.run(distillation_loss).row_loss_N, 1e-12)
    hidden, weight, bias = banned.gradients(distillation_loss)
    for actual, wanted in zip((hidden, weight[kept], bias[kept]), case.gradients(distillation_loss), strict=True):
        assert_close(actual, wanted, 1e-12)
    assert not weight[[3, 7]].any()
    assert not bias[[3, 7]].any()
    assert_like_reference(banned, 1e-10, 1e-10)


@pytest.mark.parametrize("divergences", [found for found in DIVERGENCES if "reverse_kl" not in found])
def test_tokens_that_the_teacher_alone_excludes_have_probability_zero(make_case, divergences):
    case = make_case(bias=True, **divergence_settings(*divergences))
    case.aligned_head.bias_V[[3, 7]] = -torch.inf
    assert_like_reference(case, 1e-10, 1e-10)
    assert case.gradients(distillation_loss)[2][[3, 7]].abs().min() > 0  # the student learns to leave them alone


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_any_chunk_size_gives_the_same(make_case, alpha):
    whole = make_case(alpha=alpha, bias=True, chunk_tokens=1000)
    for chunk_tokens in (1, 2, 7, 23):
        case = make_case(alpha=alpha, bias=True, chunk_tokens=chunk_tokens)
        expected = named(whole.run(distillation_loss))
        for name, values in named(case.run(distillation_loss)).items():
            assert_close(values, expected[name], 1e-12, name)
        for actual, wanted in zip(case.gradients(distillation_loss), whole.gradients(distillation_loss), strict=True):
            assert_close(actual, wanted, 1e-12)


def test_parts_add_up_and_leave_out_the_part_weight(make_case):
    case = make_case(anchor=3.0, recovery=5.0, push_forward=7.0)
    output = case.run(distillation_loss)
    assert list(output.losses) == ["anchor", "recovery", "push_forward"]
    expected = sum(weight * loss for weight, loss in zip((3, 5, 7), output.losses.values(), strict=True))
    assert_close(output.total.detach(), expected, 1e-12)
    for number, part in enumerate(output.losses.values()):
        rows = case.term_N == number
        assert_close(part, (case.weight_N[rows] * output.row_loss_N[rows]).sum(), 1e-12)
        assert not part.requires_grad
        assert part > 0


def test_values_worked_out_by_hand():
    # Identity heads make logits the hidden states themselves: p_s = p_b = (1/2, 1/4, 1/4), p_a = (1/4, 1/4, 1/2).
    # So KL(p_a || p_s) = (ln 2) / 4 at temperature 1.
    half, quarter = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    student_NH = torch.stack([half, quarter, quarter]).repeat(2, 1)
    aligned_NH = torch.stack([quarter, quarter, half]).repeat(2, 1)
    head = Head(torch.eye(3))
    inputs = LossInputs(
        HiddenStates(student_NH, head),
        HiddenStates(aligned_NH, head),
        None,
        torch.tensor([RECOVERY, PUSH_FORWARD]),
        torch.tensor([2.0, 3.0]),
    )
    settings = loss_settings(recovery=10.0, push_forward=100.0, push_temperature=1.0)
    output = distillation_loss(inputs, settings)
    divergence = 0.6931472 / 4
    assert output.row_loss_N.tolist() == pytest.approx([divergence] * 2, rel=1e-6)
    assert output.total.item() == pytest.approx((2 * 10 + 3 * 100) * divergence, rel=1e-6)


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
    ("field", "name"), [("student_hidden_NH", "student"), ("aligned_hidden_NH", "aligned"), ("weight_N", "weight")]
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
