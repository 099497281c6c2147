"""Identities of the divergences, temperature, margin and top tokens, whatever the reference says."""

from __future__ import annotations

import math

import pytest
import torch

from raycomplete.losses import Head, LossOutput, LossSettings, TokenKind, distillation_loss
from raycomplete.runtime.errors import NotFiniteError

# Identity heads make logits the hidden states themselves.
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def kl(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * (first / second).log()).sum())


def one_row(student: torch.Tensor, aligned: torch.Tensor, kind: TokenKind, **settings: object) -> LossOutput:
    head = Head(torch.eye(len(student), dtype=torch.float64))
    rows = [item.log()[None] for item in (student, aligned, student)]
    kind_N, weight_N = torch.tensor([kind]), torch.ones(1, dtype=torch.float64)
    return distillation_loss(rows[0], head, rows[1], head, rows[2], head, kind_N, weight_N, LossSettings(**settings))


@pytest.mark.parametrize("kind", [TokenKind.ANCHOR, TokenKind.RECOVERY])
def test_values_worked_out_by_hand(kind):
    mean = (P + Q) / 2
    expected = {"forward_kl": kl(Q, P), "reverse_kl": kl(P, Q), "jsd": (kl(P, mean) + kl(Q, mean)) / 2}
    for name, value in expected.items():
        output = one_row(P, Q, kind, **{f"{kind.name.lower()}_divergence": name})
        assert output.total.item() == pytest.approx(value, rel=1e-12)


def test_jsd_is_symmetric_and_at_most_log_two():
    forth, back = (one_row(*pair, TokenKind.ANCHOR, anchor_divergence="jsd").total.item() for pair in ((P, Q), (Q, P)))
    assert forth == pytest.approx(back, rel=1e-12)
    apart = [torch.tensor(values, dtype=torch.float64) for values in ([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12])]
    assert one_row(*apart, TokenKind.ANCHOR, anchor_divergence="jsd").total.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_temperature_is_that_of_softer_models_times_its_square(divergence):
    softer = [item.sqrt() / item.sqrt().sum() for item in (P, Q)]
    warm = one_row(P, Q, TokenKind.ANCHOR, anchor_divergence=divergence, temperature=2.0)
    assert warm.total.item() == pytest.approx(
        4 * one_row(*softer, TokenKind.ANCHOR, anchor_divergence=divergence).total.item(), rel=1e-12
    )


def test_temperature_leaves_the_penalty_alone(make_case):
    cold, warm = (make_case(kinds=[TokenKind.PENALTY] * 23, temperature=value) for value in (1.0, 3.0))
    assert torch.equal(cold.run(distillation_loss).total, warm.run(distillation_loss).total)


def test_a_teacher_that_excludes_what_the_student_allows_is_infinite_for_reverse_kl_only():
    excluding = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    head = Head(torch.eye(3, dtype=torch.float64))
    bias_V = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    aligned = Head(torch.eye(3, dtype=torch.float64), bias_V)
    aligned_NH = excluding.clamp(min=0.1).log()[None]
    arguments = (P.log()[None], head, aligned_NH, aligned, None, None, torch.tensor([0]), torch.ones(1).double())
    mean = (P + excluding) / 2
    jsd = (kl(P, mean) + kl(excluding[:2], mean[:2])) / 2
    assert distillation_loss(*arguments, LossSettings(anchor_divergence="jsd")).total.item() == pytest.approx(jsd)
    with pytest.raises(NotFiniteError, match="loss of the student"):
        distillation_loss(*arguments, LossSettings(anchor_divergence="reverse_kl"))


def test_margin_and_top_tokens_by_hand():
    # Base is the student: log ratios to aligned are ln 2.5, ln 1.5 and below 0.
    def favored(margin: float, count: int) -> tuple[list[int], list[float]]:
        output = one_row(P, Q, TokenKind.PENALTY, margin=margin, top_tokens=count)
        assert output.base_favored_mass_P.item() == pytest.approx(sum(output.top_mass_PK[0].tolist()))
        return output.top_token_PK[0].tolist(), output.top_mass_PK[0].tolist()

    assert favored(0.0, 2) == ([0, 1], pytest.approx([0.5, 0.3]))
    assert favored(0.5, 2) == ([0, -1], pytest.approx([0.5, 0.0]))
    assert favored(1.0, 2) == ([-1, -1], [0.0, 0.0])
    assert favored(0.0, 5) == ([0, 1, -1, -1, -1], pytest.approx([0.5, 0.3, 0, 0, 0]))  # more than the vocabulary


def test_kl_to_the_student_is_measured_where_it_is_penalised():
    output = one_row(P, Q, TokenKind.PENALTY)
    assert output.aligned_student_kl_P.item() == pytest.approx(kl(Q, P))


def test_top_tokens_are_off_by_default(make_case):
    output = make_case(dtype=torch.float32).run(distillation_loss)
    assert output.top_token_PK.shape == output.top_mass_PK.shape == (7, 0)
    assert output.top_token_PK.dtype == torch.int64
