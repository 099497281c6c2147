"""Rival methods on rows of logits: their losses and gradients are their authors' formulas, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.losses import Head, HiddenStates, LossInputs, LossSettings, distillation_loss
from raycomplete.losses.reference import reference_loss
from raycomplete.losses.terms import LogProbs
from raycomplete.methods.registry import METHODS, AnchorItem, RecoveryItem, made_term
from raycomplete.methods.rivals.augmentation import Augmentation
from raycomplete.methods.rivals.door import DOOR
from raycomplete.methods.rivals.npo import NPO, NPO_TERM, NpoSettings
from raycomplete.methods.rivals.shared import away_rows
from raycomplete.methods.rivals.unlikelihood import Unlikelihood, unlikelihood
from raycomplete.methods.rivals.w_door import WDOOR
from tests.methods.plain import Case, Ids, changed, mean

PLAIN = {"anchor_batch_size": 3, "recovery_batch_size": 3}


def cut_of(case: Case, place: int) -> int:
    """Where the first sequence of a harmful item is cut."""
    return case.method.sequences(case.plan.recovery[place])[0].depth


def test_augmentation_is_the_mean_over_the_tokens_of_both_parts(tmp_path: Path) -> None:
    case = Case(tmp_path, Augmentation.model_validate(PLAIN))

    def plain() -> Tensor:
        parts = [case.plain.log_probs("student", *pair) for pair in case.answers]
        for place, sample in enumerate(case.harmful):
            context = sample.prompt_ids + sample.harmful_ids[: cut_of(case, place)]
            parts.append(case.plain.log_probs("student", context, sample.refusal_ids))
        return -torch.cat(parts).mean()

    case.assert_like(plain)


@pytest.mark.parametrize("method", [Augmentation(), DOOR()])
def test_half_of_the_refusals_follow_the_prompt_alone_and_the_others_any_cut(method: Any) -> None:
    sample = RecoverySample("", (1, 2), (1, 2), tuple(range(10, 20)), (8, 9))
    cuts = [
        method.sequences(RecoveryItem(replace(sample, sample_id=f"s{i % 200}"), i // 200 + 1))[0].depth
        for i in range(2000)
    ]
    assert 0.4 < sum(cut == 0 for cut in cuts) / len(cuts) < 0.6
    assert set(cuts) >= set(range(10))
    by_sample = {len(set(cuts[i::200])) for i in range(200)}
    assert by_sample == {1} if isinstance(method, DOOR) else max(by_sample) > 6, "theirs are cut once, or in every draw"
    other = replace(sample, harmful_ids=tuple(range(20, 30)))
    cuts_of = [
        [method.sequences(RecoveryItem(replace(item, sample_id=f"s{i}"), 3))[0].depth for item in (sample, other)]
        for i in range(200)
    ]
    assert sum(first == second for first, second in cuts_of) < 120, "another seed draws another h and another cut"


def test_an_h_that_is_shorter_than_the_depths_drawn_is_cut_anew_in_every_draw() -> None:
    sample = RecoverySample("s", (1, 2), (1, 2), tuple(range(10, 20)), (8, 9))
    items = [RecoveryItem.cut(sample, depth) for depth in range(10, 100)]
    assert {item.depth for item in items} == {10}
    assert {Augmentation().sequences(item)[0].depth for item in items} == set(range(11))


def test_unlikelihood(tmp_path: Path) -> None:
    case = Case(tmp_path, changed(Unlikelihood, PLAIN, harmful_weight=0.7))

    def plain() -> Tensor:
        kept = torch.cat([case.plain.log_probs("student", *pair) for pair in case.answers])
        lost = torch.cat([case.plain.log_probs("student", item.prompt_ids, item.harmful_ids) for item in case.harmful])
        return -kept.mean() - 0.7 * (1 - lost.exp()).log().mean()

    case.assert_like(plain)


def npo(case: Case, prompt: Ids, harmful: Ids, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta (L_s - L_a)) of one continuation."""
    ratio = (case.plain.log_probs("student", prompt, harmful) - case.plain.log_probs("aligned", prompt, harmful)).sum()
    return -2 / beta * torch.sigmoid(-beta * ratio).log()


@pytest.mark.parametrize("retain", ["nll", "retain_kl"])
def test_npo(retain: str, tmp_path: Path) -> None:
    case = Case(tmp_path, changed(NPO, PLAIN | {"beta": 0.3}, retain=retain, retain_weight=0.5))

    def plain() -> Tensor:
        rows = [
            case.plain.kl(*p) if retain == "retain_kl" else -case.plain.log_probs("student", *p) for p in case.answers
        ]
        return 0.5 * torch.cat(rows).mean() + mean([npo(case, s.prompt_ids, s.harmful_ids, 0.3) for s in case.harmful])

    case.assert_like(plain)


def test_door(tmp_path: Path) -> None:
    case = Case(tmp_path, changed(DOOR, PLAIN | {"alpha": 0.3}, beta=0.4, plain_fraction=0.2))
    assert len({cut_of(case, place) for place in range(3)}) > 1

    def plain() -> Tensor:
        kept = mean([-case.plain.log_probs("student", *pair).sum() for pair in case.answers])
        both = []
        for place, sample in enumerate(case.harmful):
            cut = cut_of(case, place)
            context = sample.prompt_ids + sample.harmful_ids[:cut]
            refusal = -case.plain.log_probs("student", context, sample.refusal_ids).sum()
            both.append(refusal + npo(case, context, sample.harmful_ids[cut:], 0.4))
        return 0.7 * kept + 0.3 * mean(both)

    case.assert_like(plain)


@pytest.mark.parametrize("sign", ["code", "paper"])
@pytest.mark.parametrize("token_weights", ["exp", "sigmoid"])
def test_w_door(sign: str, token_weights: str, tmp_path: Path) -> None:
    """p_d stands in the place of base."""
    settings = PLAIN | {"alpha": 0.3, "token_weights": token_weights}
    case = Case(tmp_path, changed(WDOOR, settings, beta=0.4, tau=1.7, sign=sign))

    def plain() -> Tensor:
        kept = mean([-case.plain.log_probs("student", *pair).sum() for pair in case.answers])
        both = []
        for place, sample in enumerate(case.harmful):
            cut = cut_of(case, place)
            read = (sample.prompt_ids + sample.harmful_ids[:cut], sample.refusal_ids)
            log_s, log_a, log_d = (case.plain.log_probs(model, *read) for model in ("student", "aligned", "base"))
            if token_weights == "exp":
                weight = torch.exp((log_a - log_d if sign == "code" else log_d - log_a) / 1.7)
            else:
                weight = 1 - torch.sigmoid((log_d - log_a if sign == "code" else log_a - log_d) / 1.7)
            both.append(-(weight * log_s).sum() + npo(case, read[0], sample.harmful_ids[cut:], 0.4))
        return 0.7 * kept + 0.3 * mean(both)

    case.assert_like(plain)


@pytest.mark.parametrize("formula", [unlikelihood, away_rows])
def test_what_turns_a_token_away_has_a_gradient_however_sure_the_student_is(formula: Any) -> None:
    """-log(1 - p) = log(1 + exp(z)) for logits z and 0: its slope is p."""
    for logit in (0.0, 10.0, 20.0, 40.0):
        logit_R2 = torch.tensor([[logit, 0.0]], requires_grad=True)
        rows = LogProbs(logit_R2.log_softmax(-1), None, None, torch.tensor([0]))
        found = formula(rows, None)
        loss_R = found[0] if isinstance(found, tuple) else found
        (slope_R2,) = torch.autograd.grad(loss_R.sum(), logit_R2)
        assert float(loss_R.detach()) == pytest.approx(math.log1p(math.exp(logit)))
        assert float(slope_R2[0, 0]) == pytest.approx(1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize("name", ["augmentation", "unlikelihood", "npo", "door", "w_door"])
def test_harmful_prompts_are_no_harmless_answers(name: str) -> None:
    samples = [AnchorSample(kind, (1, 2), (3, 4), kind) for kind in ("benign", "borderline", "harmful")]
    assert METHODS[name](name=name).trained(samples) == tuple(samples[:2])
    (kept,) = METHODS[name](name=name).sequences(AnchorItem(samples[0]))
    assert [(span.start, span.count) for span in kept.spans] == [(2, 2)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_a_loss_of_whole_sequences_is_that_of_the_reference_beside_terms_of_rows(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Rows of a sequence stand apart, in chunks of five."""
    generator = torch.Generator().manual_seed(3)
    made_term(NPO_TERM).add()
    settings = LossSettings({"nll": 0.5, "npo": 2.0, "anchor": 1.5}, {"npo": NpoSettings(beta=0.7)}, chunk_tokens=5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    term_N, sequence_N = torch.arange(24) % 3, torch.arange(24) % 4
    weight_N = torch.tensor([0.3, 0.2, 0.9, 0.4], dtype=torch.float64)[sequence_N]
    weight_V = normal(31, 8).requires_grad_()
    hidden_NH, aligned = normal(24, 8).requires_grad_(), HiddenStates(normal(16, 6), Head(normal(31, 6)))
    tokens_N = torch.randint(0, 31, (24,), generator=generator)
    student = HiddenStates(hidden_NH, Head(weight_V))
    inputs = LossInputs(student, aligned, None, term_N, weight_N, tokens_N, sequence_N)
    found, expected = distillation_loss(inputs, settings), reference_loss(inputs, settings)
    for name in ("nll", "npo", "anchor"):
        assert float(found.losses[name]) == pytest.approx(float(expected.losses[name]), rel=tolerance), name
    assert float(found.total.detach()) == pytest.approx(float(expected.total.detach()), rel=tolerance)
    assert torch.allclose(found.row_loss_N.double(), expected.row_loss_N, rtol=10 * tolerance, atol=10 * tolerance)
    gradients = (torch.autograd.grad(output.total, [hidden_NH, weight_V]) for output in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert float((mine.double() - theirs).norm() / theirs.double().norm()) < tolerance
    with pytest.raises(ValueError, match="sequence_N is None"):
        distillation_loss(replace(inputs, sequence_N=None), settings)
