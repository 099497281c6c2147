"""The loss and its gradients against the float64 reference, and identities that must hold whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from raycomplete.losses import Head, HiddenStates, LossInputs, distillation_loss
from raycomplete.losses.reference import reference_loss
from tests.losses.conftest import NUMBERS, PUSH_FORWARD, RECOVERY, loss_settings, named

HEADS = [
    {},
    {"bias": True},
    {"scale": 0.5},
    {"softcap": 1.5},
    {"bias": True, "scale": 2.0, "softcap": 3.0},
]


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
        num_rows=6,
        vocab_size=4,
        hidden_sizes=(2, 2, 4),
        chunk_tokens=4,
        temperature=0.6,
        **settings,
        **head,
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
