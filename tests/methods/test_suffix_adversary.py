"""The adversary of suffixes: what it finds and what the student trains behind it are those of plain float64 passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import MID_ANSWER, RecoverySample
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import RecoveryItem, RowSpan, TeacherContext
from raycomplete.methods.suffix_adversary import SuffixAdversaryConfig, SuffixedSequences
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.step_plan import StepSequences
from tests.methods.plain import MICRO_BATCHES, Case, Ids, assert_gradients

STEPS, LR, WANTED, WEIGHT = 3, 0.4, 2, 2.5
SETTINGS = {
    "anchor_batch_size": 3,
    "recovery_batch_size": 3,
    "suffix_adversary": {"steps": STEPS},
}


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"lr": LR, "target_tokens": WANTED, "weight": WEIGHT}.items():
        monkeypatch.setattr(SuffixAdversaryConfig, name, value)


SAMPLE = RecoverySample("r", (1, 2, 3), (9, 1, 2, 3), (4, 5, 6, 7), (8, 8))


def with_suffixes(case: Case) -> None:
    """The last two tokens of two prompts of three become their suffix."""
    first, *others = case.plan.recovery
    suffixed = [
        replace(item, sample=replace(item.sample, suffix=(len(item.sample.prompt_ids) - 2, 2))) for item in others
    ]
    case.plan = replace(case.plan, recovery=(first, *suffixed))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_is_that_of_plain_passes(
    packed: bool, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuffixedSequences, "words", next_words)
    case = Case(tmp_path, Completion.model_validate(SETTINGS))
    case.packed = packed
    with_suffixes(case)
    lm = load_model(case.job.start, "float32").double().train()
    if checkpointing:
        lm.gradient_checkpointing_enable()
    student = case.student(lm)
    outputs = case.outputs(student)
    assert len(outputs) == MICRO_BATCHES
    expected, gain = plain_loss(case)
    assert gain > 0.1, "the adversary gains on h"
    expected.backward()
    assert sum(float(output.total.detach()) for output in outputs) == pytest.approx(float(expected.detach()), rel=1e-6)
    # Teacher states and the loss are float32, which gives 0.9e-6 with AVX-512 and 1.2e-6 with AVX2.
    assert_gradients(student.lm.named_parameters(), case.plain.models["student"].parameters(), 1e-5)
    own = int(checkpointing)  # transformers has a hook there then
    assert len(student.lm.get_input_embeddings()._forward_hooks) == own, "nothing is left behind"


def next_words(search: SuffixedSequences, vocab_size: int) -> list[Tensor]:
    """The adversary begins with the next word of the vocabulary in place of each that is there."""
    words = (search.batch.input_ids_BT.flatten()[search.place_P] + 1) % vocab_size
    return list(words.split(search.batch.suffix_S3[:, 1].tolist()))


def plain_loss(case: Case) -> tuple[Tensor, float]:
    """Anchor, recovery and push-forward, each sequence read by itself; and how likelier the adversary made h."""
    model = case.plain.models["student"]
    anchors = [case.plain.kl(*pair) for pair in case.answers]
    recoveries, pushed, gain = [], [], 0.0
    for item in case.plan.recovery:
        sample, h = item.sample, item.sample.harmful_ids[: item.depth]
        prompt, first = sample.prompt_ids, sample.refusal_prefix_tokens or int(not sample.can_move_suffix)
        suffix_TH = None
        if sample.can_move_suffix:
            suffix_TH, found = adversary(model, prompt, h, sample.suffix)
            gain += found
        logits_TV = read(model, prompt + h + sample.refusal_ids, sample.suffix[0], suffix_TH)
        target_TV = case.plain.models["aligned"](torch.tensor([sample.teacher_prompt_ids + sample.refusal_ids]))
        target_TV = target_TV.logits[0, len(sample.teacher_prompt_ids) - 1 : -1].detach()
        start = len(prompt) + item.depth - 1
        recoveries.append(kl(target_TV, logits_TV[start : start + len(sample.refusal_ids)]))
        rows = slice(len(prompt) - 1 + first, len(prompt) - 1 + item.depth)
        weights_T = torch.ones(len(rows_T := logits_TV[rows]), dtype=logits_TV.dtype)
        weights_T[: WANTED * sample.can_move_suffix] = WEIGHT  # of the rows against which the adversary moved
        pushed.append(weights_T * 16 * kl(target_TV[:1] / 4, rows_T / 4))
    return sum(torch.cat(rows).mean() for rows in (anchors, recoveries, pushed)), gain  # type: ignore[return-value]


def adversary(model: Any, prompt: Ids, h: Ids, suffix: tuple[int, int]) -> tuple[Tensor, float]:
    """The embeddings of the suffix, and how many nats likelier they make h."""
    words = torch.tensor(prompt[suffix[0] : sum(suffix)]) + 1
    suffix_TH = model.get_input_embeddings().weight.detach()[words]
    move, wanted, losses = LR * suffix_TH.square().mean().sqrt(), h[:WANTED], []
    for _ in range(STEPS + 1):
        suffix_TH.requires_grad_()
        log_p_TV = read(model, prompt + h + (0,), suffix[0], suffix_TH).log_softmax(-1)
        rows = torch.arange(len(wanted)) + len(prompt) - 1
        loss = -log_p_TV[rows, torch.tensor(wanted)].sum()
        losses.append(float(loss.detach()))
        (gradient_TH,) = torch.autograd.grad(loss, suffix_TH)
        last = suffix_TH.detach()
        suffix_TH = last - move * gradient_TH.sign()
    return last, losses[0] - losses[-1]


def read(model: Any, token_ids: Ids, start: int, suffix_TH: Tensor | None) -> Tensor:
    """Logits at all tokens but the last, where the student reads other embeddings from a position on."""
    embedding_TH = model.get_input_embeddings()(torch.tensor(token_ids[:-1]))
    if suffix_TH is not None:
        embedding_TH = torch.cat([embedding_TH[:start], suffix_TH, embedding_TH[start + len(suffix_TH) :]])
    logits_TV: Tensor = model(inputs_embeds=embedding_TH[None]).logits[0]
    return logits_TV


def kl(target_TV: Tensor, logits_TV: Tensor) -> Tensor:
    target_TV, logits_TV = target_TV.log_softmax(-1), logits_TV.log_softmax(-1)
    return (target_TV.exp() * (target_TV - logits_TV)).sum(-1)


def test_the_search_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    case = Case(tmp_path, Completion.model_validate(SETTINGS))
    builder = BatchBuilder(case.settings, 1.0)

    def search() -> SuffixedSequences | None:
        step = StepSequences.of(case.plan, case.method)
        (chunk,) = step.micro_batches(0, 1, 1)
        return SuffixedSequences.of_batch(builder.build(chunk, step.normalisers, case.scores), "push_forward", WANTED)

    assert search() is None, "no prompt has a suffix"
    with_suffixes(case)
    found = search()
    assert found is not None
    rows = {tuple(row) for row in found.batch.input_ids_BT.tolist()}
    reads = [_read(item) for item in case.plan.recovery[1:]]
    width = max(map(len, reads))
    assert rows == {read + (0,) * (width - len(read)) for read in reads}
    assert len(found.place_P) == len(found.origin_P) == 4


def _read(item: RecoveryItem) -> Ids:
    """Tokens up to the row of the last one that the adversary wants."""
    sample, first = item.sample, item.sample.refusal_prefix_tokens
    return sample.prompt_ids + sample.harmful_ids[: first + min(item.depth - first, WANTED) - 1]


def test_the_adversary_starts_anew_at_another_depth_whatever_else_is_in_the_batch() -> None:
    sample = SAMPLE.augmented("random suffix", (1, 2, 70, 71, 3))
    seeds = {}
    for depth in (1, 30, 31):
        for drawn in (depth, depth):
            found = Completion.model_validate(SETTINGS).sequence(RecoveryItem.cut(sample, drawn)).suffix
            assert found is not None
            seeds.setdefault(depth, set()).add(found.seed)
    assert [len(found) for found in seeds.values()] == [1, 1, 1], "the same on every worker and in a resumed run"
    assert len(set().union(*seeds.values())) == 3, "also where h ends before the drawn depth"


def test_a_suffix_is_what_was_put_behind_the_prompt() -> None:
    assert SAMPLE.augmented("random suffix", (1, 2, 70, 71, 3)).suffix == (2, 2), "3 ends the turn"
    assert SAMPLE.augmented("suffix", (1, 2, 2, 3)).can_move_suffix
    assert not replace(SAMPLE, source=f"base {MID_ANSWER}").augmented("suffix", (1, 2, 70, 3)).can_move_suffix
    assert not replace(SAMPLE, refusal_prefix_tokens=1).augmented("suffix", (1, 2, 70, 3)).can_move_suffix
    assert SAMPLE.augmented("suffix", (1, 2, 2, 3)).suffix == (2, 1), "a word of the prompt again"
    assert not SAMPLE.augmented("template", (50, 1, 2, 51, 3)).can_move_suffix
    assert not SAMPLE.augmented("suffix", (1, 3)).can_move_suffix, "nothing was added"


def test_push_forward_begins_at_position_0_behind_a_suffix_that_is_moved() -> None:
    item = RecoveryItem(SAMPLE.augmented("random suffix", (1, 2, 70, 3)), 3)
    refusal, h = TeacherContext((9, 1, 2, 3), (8, 8)), TeacherContext((9, 1, 2, 3), (4, 5, 6, 7))
    moved = Completion.model_validate(SETTINGS).sequence(item)
    assert moved.suffix is not None
    assert (moved.suffix.start, moved.suffix.count) == (2, 1)
    assert moved.spans[0] == RowSpan("push_forward", 4, 3, h, offset=0, target=(refusal, 0))
    still = Completion().sequence(item)
    assert still.suffix is None
    assert still.spans[0] == RowSpan("push_forward", 5, 2, h, offset=1, target=(refusal, 0))
