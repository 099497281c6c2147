"""The table of terms: what a formula alone is enough for, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raycomplete.losses import (
    DivergenceSettings,
    Head,
    HiddenStates,
    LogProbs,
    LossInputs,
    LossOutput,
    LossSettings,
    Term,
    TermRows,
    distillation_loss,
    get,
    register,
)
from raycomplete.losses.reference import reference_loss
from raycomplete.losses.settings import PenaltySettings
from raycomplete.losses.terms import TERMS
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section
from tests.losses.conftest import named
from tests.losses.test_loss import HEADS, assert_close, assert_like_reference

NUM_ROWS, VOCAB = 23, 31


class PushSettings(Section):
    """Settings of a term of the user's."""

    power: float = 2.0


def push(rows: LogProbs, options: PushSettings) -> TermRows:
    """A term of the user's that reads all there is."""
    token_R1 = rows.token_N[:, None]
    log_p_R, log_a_R, log_b_R = (
        values_RV.gather(1, token_R1)[:, 0] for values_RV in (rows.student_NV, rows.aligned_NV, rows.base_NV)
    )
    distance_R = (log_p_R - log_a_R).abs() ** options.power
    return TermRows(distance_R + log_b_R.exp() * log_p_R, {"distance": distance_R.detach()})


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is as it was after each test."""
    for name, term in {
        "push": Term("push", "push", "distance", push, ("aligned", "base"), {"distance": "d"}, PushSettings)
    }.items():
        monkeypatch.setitem(TERMS, name, term)


def mixed(
    weights: dict[str, float], dtype: torch.dtype, seed: int = 0, **head: Any
) -> tuple[LossInputs, list[torch.Tensor]]:
    """Rows of several terms, each with the hidden states that its term reads; and the student's leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    heads = [
        Head(
            normal(VOCAB, size) / size**0.5,
            normal(VOCAB) if head.get("bias") else None,
            head.get("scale", 1.0),
            head.get("softcap"),
        )
        for size in (8, 6, 5)
    ]
    term_N = torch.arange(NUM_ROWS) % len(weights)
    reads = [get(name).teachers(get(name).options()) for name in weights]
    states = [normal(NUM_ROWS, 8).requires_grad_()]
    for role, size in (("aligned", 6), ("base", 5)):
        states.append(normal(sum(role in reads[term] for term in term_N.tolist()), size))
    heads[0].weight_VH.requires_grad_()
    student, aligned, base = (HiddenStates(*pair) for pair in zip(states, heads, strict=True))
    token_N = torch.randint(0, VOCAB, (NUM_ROWS,), generator=generator)
    weight_N = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    inputs = LossInputs(student, aligned, base, term_N, weight_N, token_N)
    return inputs, [states[0], heads[0].weight_VH]


def assert_matches(inputs: LossInputs, leaves: list[torch.Tensor], settings: LossSettings, relative: float) -> None:
    output, expected = distillation_loss(inputs, settings), reference_loss(inputs, settings)
    assert named(output).keys() == named(expected).keys()
    for name, values in named(output).items():
        assert_close(values, named(expected)[name], relative, name)
    gradients = (torch.autograd.grad(found.total, leaves) for found in (output, expected))
    for actual, wanted in zip(*gradients, strict=True):
        assert_close(actual, wanted, relative, "gradient")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_formula_alone_is_enough(head: dict[str, Any], dtype: torch.dtype, relative: float) -> None:
    weights = {"push": 0.5, "nll": 2.0, "anchor": 1.5}  # those that read less come first inside
    settings = LossSettings(weights, {"push": PushSettings(power=1.5)}, chunk_tokens=5)
    assert_matches(*mixed(weights, dtype, **head), settings, relative)


def test_metrics_survive_as_a_plain_tuple() -> None:
    weights = {"push": 0.5, "nll": 2.0, "anchor": 1.5}
    output = distillation_loss(mixed(weights, torch.float64)[0], LossSettings(weights))
    again = LossOutput.unflatten(output.flatten(), LossSettings(weights))
    assert output.metrics["distance"].numel() > 0
    assert named(again).keys() == named(output).keys()
    assert all(torch.equal(value, named(again)[name]) for name, value in named(output).items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_formulas_of_fused_terms_give_the_same_by_autograd(
    make_case: Any, head: dict[str, Any], alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name, term in TERMS.items() if term.torch_block} == {"anchor", "recovery", "push_forward"}
    assert get("push_forward").label == "push-forward"
    for name in ("anchor", "recovery", "push_forward"):
        monkeypatch.setitem(TERMS, name, replace(get(name), torch_block=None))
    case = make_case(anchor_divergence="jsd", temperature=1.7, alpha=alpha, **head)
    assert_like_reference(case, 1e-10, 1e-10)


def penalty_by_hand() -> LossInputs:
    """A row whose hidden states are log-probabilities: (5, 2, 1) / 8 of the student, (2, 3, 3) / 8 of aligned."""
    rows = ([5 / 8, 1 / 4, 1 / 8], [1 / 4, 3 / 8, 3 / 8], [1 / 2, 1 / 2, 1e-9])
    student, aligned, base = (HiddenStates(torch.tensor([row]).log(), Head(torch.eye(3))) for row in rows)
    student.hidden_NH.requires_grad_()
    return LossInputs(student, aligned, base, torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize(("margin", "favored"), [(0.1, (1, 1, 0)), (0.5, (1, 0, 0)), (0.7, (0, 0, 0))])
def test_the_penalty_is_the_sum_of_squares_over_base_favored_tokens(margin: float, favored: tuple[int, ...]) -> None:
    """Base exceeds aligned by ln 2 = 0.69 and ln 4/3 = 0.29 nats at the first two tokens."""
    inputs, favored_V = penalty_by_hand(), torch.tensor(favored)
    output = distillation_loss(inputs, LossSettings({"penalty": 2.0}, {"penalty": PenaltySettings(margin=margin)}))
    p_V = torch.tensor([5 / 8, 1 / 4, 1 / 8])
    loss = (p_V.square() * favored_V).sum()
    assert output.row_loss_N.tolist() == pytest.approx([float(loss)])
    (gradient_NV,) = torch.autograd.grad(output.total, inputs.student.hidden_NH)
    torch.testing.assert_close(gradient_NV[0], 2.0 * 2 * p_V * (p_V * favored_V - loss))


@pytest.mark.parametrize("role", ["aligned", "base"])
def test_nan_of_a_teacher_reaches_the_penalty(role: str) -> None:
    inputs = penalty_by_hand()
    inputs.teachers[role].hidden_NH[0, 2] = torch.nan  # type: ignore[index]
    output = distillation_loss(inputs, LossSettings({"penalty": 1.0}), must_be_finite=False)
    assert output.row_loss_N.isnan().all(), "an empty B_t would say that nothing is left to train"
    (gradient_NV,) = torch.autograd.grad(output.total, inputs.student.hidden_NH)
    assert gradient_NV.isnan().any()


def test_rows_that_read_no_teacher_need_none() -> None:
    inputs, leaves = mixed({"nll": 1.0}, torch.float64)
    assert_matches(replace(inputs, aligned=None, base=None), leaves, LossSettings({"nll": 1.0}), 1e-10)
    logits_NV = inputs.student.head.logits(inputs.student.hidden_NH)
    expected = torch.nn.functional.cross_entropy(logits_NV, inputs.token_N, reduction="none")
    found = distillation_loss(replace(inputs, aligned=None, base=None), LossSettings({"nll": 1.0}))
    torch.testing.assert_close(found.row_loss_N, expected.detach())


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda rows, _: TermRows(rows.student_NV.sum()), r"must give the loss as \[23\]"),
        (lambda rows, _: TermRows(rows.student_NV[:, 0], {"other": rows.student_NV[:, 0]}), "must give the metrics"),
        (lambda rows, _: TermRows(rows.student_NV[:, 0], {"seen": rows.student_NV}), r"must give seen as \[23\]"),
        (lambda rows, _: TermRows(rows.base_NV[:, 0]), "asks for base"),
    ],
)
def test_what_a_formula_gets_wrong_is_named(formula: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"seen": "a value"}
    monkeypatch.setitem(TERMS, "wrong", Term("wrong", "wrong", "wrong", formula, ("aligned",), metrics))
    inputs, _ = mixed({"wrong": 1.0}, torch.float64)
    with pytest.raises(ValueError, match=message):
        distillation_loss(inputs, LossSettings({"wrong": 1.0}))


def test_names_must_be_known_and_free() -> None:
    with pytest.raises(ConfigError, match="no loss term 'pull'") as error:
        get("pull")
    assert "anchor, nll, opening, penalty, push, push_forward, recovery" in str(error.value.remedy)
    with pytest.raises(ValueError, match="a loss term 'push' already"):
        register(get("push"))
    with pytest.raises(ValueError, match="'loss' belongs to the whole loss"):
        register(replace(get("push"), name="pull", metrics={"loss": "a metric"}))


def test_options_must_be_the_terms_own_and_metrics_unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = mixed({"push": 1.0}, torch.float64)
    with pytest.raises(ValueError, match="must be PushSettings"):
        distillation_loss(inputs, LossSettings({"push": 1.0}, {"push": DivergenceSettings()}))
    monkeypatch.setitem(TERMS, "pull", replace(get("push"), name="pull"))
    with pytest.raises(ValueError, match="metric 'distance' of the term 'pull'"):
        distillation_loss(inputs, LossSettings({"push": 1.0, "pull": 1.0}))
