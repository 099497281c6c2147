"""The method `completion`: its settings, rows and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.losses.settings import (
    ContrastiveSettings,
    DivergenceSettings,
    LossSettings,
    PushForwardSettings,
)
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    Method,
    RecoveryItem,
    RowSpan,
    TeacherContext,
    TrainSequence,
)
from raycomplete.methods.sft import SFT


@pytest.fixture(autouse=True)
def two_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycomplete.methods.completion.FIRST_TOKENS", 2)


ANCHOR = AnchorItem(AnchorSample("a", (1, 2), (3, 4, 5)))
RECOVERY = RecoveryItem(RecoverySample("r", (1, 2, 3), (9, 1, 2, 3), (4, 5, 6, 7), (8, 8), refusal_prefix_tokens=1), 3)


def test_the_loss_is_that_of_the_run_file() -> None:
    weights = {"anchor": 2.0, "recovery": 3.0, "push_forward": 5.0, "opening": 6.0, "penalty": 4.0}
    method = Completion.model_validate(
        {"weights": weights, "push_forward_temperature": 3, "contrastive_alpha": 0.4, "depth": {"max": 9}}
    )
    distilled = DivergenceSettings(contrastive=ContrastiveSettings(alpha=0.4))
    options = {"anchor": distilled, "recovery": distilled, "push_forward": PushForwardSettings(temperature=3)}
    assert method.loss() == LossSettings(weights, options)


def test_an_anchor_item_is_its_answer() -> None:
    found = Completion().sequence(ANCHOR)
    assert found.token_ids == (1, 2, 3, 4, 5)
    assert found.spans == (RowSpan("anchor", 2, 3, TeacherContext((1, 2), (3, 4, 5))),)
    assert (len(found), found.depth) == (4, -1)


@pytest.mark.parametrize("method", [Completion(), SFT()])
def test_of_an_answer_that_complies_the_first_token_is_kept(method: Method) -> None:
    found = method.sequence(AnchorItem(replace(ANCHOR.sample, kind="harmful", complies=True)))
    assert found.token_ids == (1, 2, 3)
    assert [(span.start, span.count) for span in found.spans] == [(2, 1)]
    assert sum(method.normalisers([found]).values()) == 1, "what is dropped does not thin out the rest"


def test_of_an_augmented_prompt_the_teachers_read_the_plain_form() -> None:
    anchor = method_sequence(AnchorItem(ANCHOR.sample.augmented("suffix", (1, 2, 90))))
    assert anchor.token_ids == (1, 2, 90, 3, 4, 5)
    assert anchor.spans == (RowSpan("anchor", 3, 3, TeacherContext((1, 2), (3, 4, 5))),)
    plain = RecoveryItem(replace(RECOVERY.sample, teacher_prompt_ids=(1, 2, 3)), 3)
    recovery = method_sequence(replace(plain, sample=plain.sample.augmented("suffix", (1, 2, 3, 90))))
    assert recovery.token_ids == (1, 2, 3, 90, 4, 5, 6, 8, 8)
    contexts = [span.context for span in method_sequence(plain).spans]
    assert [span.context for span in recovery.spans] == contexts, "so it costs no score either"
    assert {context.prompt_ids for context in contexts if context} == {(1, 2, 3)}


def method_sequence(item: Item) -> TrainSequence:
    return Completion().sequence(item)


def test_a_recovery_item_is_h_up_to_the_cut_and_the_refusal_without_h_before_the_teacher() -> None:
    found = Completion.model_validate({"weights": {"opening": 0.3}}).sequence(RECOVERY)
    refusal = TeacherContext((9, 1, 2, 3), (8, 8))
    assert found.token_ids == (1, 2, 3, 4, 5, 6, 8, 8)
    assert found.spans == (
        # Token 4 is a refusal prefix; 5 and 6 are h. What aligned says first to the prompt alone is their target.
        RowSpan("push_forward", 4, 2, TeacherContext((9, 1, 2, 3), (4, 5, 6, 7)), offset=1, target=(refusal, 0)),
        RowSpan("opening", 3, 1, token_ids=(8,)),
        RowSpan("recovery", 6, 2, refusal),
    )
    assert (len(found), found.depth) == (7, 2), "a refusal prefix is no depth"


def test_rows_along_h_begin_after_position_0_and_after_a_refusal_prefix() -> None:
    method = Completion.model_validate({"weights": {"penalty": 1}})
    for prefix, expected in ((0, {(4, 2, 1)}), (1, {(4, 2, 1)}), (2, {(5, 1, 2)}), (3, set())):
        item = RecoveryItem(replace(RECOVERY.sample, refusal_prefix_tokens=prefix), 3)
        spans = method.sequence(item).spans
        along_h = [span for span in spans if span.context == TeacherContext((9, 1, 2, 3), (4, 5, 6, 7))]
        assert {(span.start, span.count, span.offset) for span in along_h} == expected
        assert [span.term for span in along_h] == (["push_forward", "penalty"] if expected else [])


def test_first_tokens_weigh_more_and_the_anchor_stays_a_mean() -> None:
    method = Completion.model_validate({"first_token_weight": 5.0, "weights": {"opening": 1}})
    anchor = method.sequence(ANCHOR)
    assert anchor.spans[0].weights == [5.0, 5.0, 1.0]
    assert method.normalisers([anchor, method.sequence(RECOVERY)]) == {
        "anchor": 11.0,
        "push_forward": 2,
        "opening": 1,
        "recovery": 2,
    }


def test_the_opening_takes_position_0_of_harmful_prompts_from_the_anchor() -> None:
    harmful = replace(ANCHOR.sample, kind="harmful")
    with_opening, without = (
        Completion.model_validate({"weights": {"opening": weight}, "first_token_weight": 5.0}) for weight in (1, 0)
    )
    plain = TeacherContext((1, 2), (3, 4, 5))
    (kept,) = without.sequence(AnchorItem(harmful)).spans
    assert kept == RowSpan("anchor", 2, 3, plain, weights=[5.0, 5.0, 1.0])
    (kept,) = with_opening.sequence(AnchorItem(harmful)).spans
    assert kept == RowSpan("anchor", 3, 2, plain, offset=1, weights=[5.0, 1.0])
    # Where aligned answers, its answer is kept at position 0 only, so that nothing is.
    (kept,) = with_opening.sequence(AnchorItem(complying := replace(harmful, complies=True))).spans
    assert kept.count == 0
    samples = (complying, harmful, ANCHOR.sample)
    assert with_opening.trained(samples) == (harmful, ANCHOR.sample), "no step spends a place on such a sample"
    assert without.trained(samples) == samples
    assert with_opening.sequence(ANCHOR) == without.sequence(ANCHOR)
