"""Micro-batches: every trained row stands beside the right hidden states, targets and weight.

What is expected is computed by plain transformers forward passes of single, unpadded sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.config import OpeningConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.heads import load_head
from raycomplete.data.samples import RecoverySample, SampleSet
from raycomplete.losses.loss_types import LossSettings, TokenKind, needs_base
from raycomplete.training.batches import BatchBuilder, Emphasis, MicroBatch
from raycomplete.training.step_plan import AnchorItem, Item, RecoveryItem, StepPlan, length
from raycomplete.training.student import HeadSettings, StudentModule, to_loss_output
from raycomplete.training.teacher_prefetcher import Scores, TeacherPrefetcher
from tests.training.tiny import LocalScores, head_spec, make_model, make_samples

MAX_DEPTH = 9
DEPTHS = (1, 4, 9, 2)
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}


@dataclass
class Tiny:
    """Three tiny models and one step on them."""

    base: Path
    aligned: Path
    student: Path
    plan: StepPlan
    scores: Scores

    @property
    def items(self) -> list[Item]:
        return self.plan.local(0, 1)

    def hidden(self, path: Path, context: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        """[T, H] states that predict a response, read alone and unpadded."""
        with torch.no_grad():
            states_TH: Tensor = (
                load_model(path, "float32").base_model(torch.tensor([context + response])).last_hidden_state[0]
            )
        return states_TH[len(context) - 1 : -1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("models")
    base, aligned, student = (make_model(folder / role, i) for i, role in enumerate(("base", "aligned", "student")))
    samples = make_samples(0, anchor=4, recovery=4)
    # The teacher of one sample reads a safety prompt that the student does not see.
    privileged = replace(samples.recovery[1], teacher_prompt_ids=(77, 78, *samples.recovery[1].prompt_ids))
    samples = replace(samples, recovery=(samples.recovery[0], privileged, *samples.recovery[2:]))
    plan = StepPlan(
        tuple(AnchorItem(sample) for sample in samples.anchor),
        tuple(RecoveryItem(sample, depth) for sample, depth in zip(samples.recovery, DEPTHS, strict=True)),
    )
    return Tiny(base, aligned, student, plan, scores_of(samples, base, aligned))


def scores_of(samples: SampleSet, base: Path, aligned: Path) -> Scores:
    prefetcher = TeacherPrefetcher(
        {"base": LocalScores(base), "aligned": LocalScores(aligned)},
        max_depth=MAX_DEPTH,
        penalty=True,
        contrastive=True,
    )
    prefetcher.request(0, samples.anchor, samples.recovery)
    return prefetcher.take(0)


def builder(*, penalty: bool = True, contrastive: bool = False, scale: float = 1.0) -> BatchBuilder:
    return BatchBuilder(penalty=penalty, contrastive=contrastive, scale=scale)


@dataclass
class Run:
    """A run of rows as it should be: the response `tokens` of an item after what the student read before."""

    item: int
    kind: TokenKind
    context: tuple[int, ...]
    tokens: tuple[int, ...]
    teacher_context: tuple[int, ...]


def expected_runs(items: list[Item], *, penalty: bool) -> Iterator[Run]:
    for index, item in enumerate(items):
        if isinstance(item, AnchorItem):
            prompt = item.sample.prompt_ids
            yield Run(index, TokenKind.ANCHOR, prompt, item.sample.answer_ids, prompt)
            continue
        sample: RecoverySample = item.sample
        h = sample.harmful_ids[: item.depth]
        if penalty:
            yield Run(index, TokenKind.PENALTY, sample.prompt_ids, h, sample.prompt_ids)
        context = sample.prompt_ids + h
        yield Run(index, TokenKind.RECOVERY, context, sample.refusal_ids, sample.teacher_prompt_ids)


def student_rows(tiny: Tiny, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        hidden_BTH = load_model(tiny.student, "float32").base_model(**batch.model_inputs()).last_hidden_state
    rows_NH: Tensor = hidden_BTH.flatten(0, 1)[batch.row_N]
    return rows_NH


@pytest.mark.parametrize("penalty", [True, False])
def test_student_rows_targets_and_kinds_line_up(tiny: Tiny, penalty: bool) -> None:
    items = tiny.items
    batch = builder(penalty=penalty).build(items, tiny.plan, tiny.scores)
    runs = list(expected_runs(items, penalty=penalty))
    hidden_NH = torch.cat([tiny.hidden(tiny.student, run.context, run.tokens) for run in runs])
    torch.testing.assert_close(student_rows(tiny, batch), hidden_NH, **CLOSE)
    assert batch.target_N.tolist() == [token for run in runs for token in run.tokens]
    assert batch.kind_N.tolist() == [int(run.kind) for run in runs for _ in run.tokens]
    assert batch.item_N.tolist() == [run.item for run in runs for _ in run.tokens]


def test_targets_are_the_tokens_after_their_rows(tiny: Tiny) -> None:
    """Read off the packed batch itself, but for the last token of a sequence, which the batch leaves out."""
    batch = builder().build(tiny.items, tiny.plan, tiny.scores)
    inputs = batch.input_ids_BT.flatten()
    positions = batch.position_ids_BT.flatten()
    inside = positions.roll(-1)[batch.row_N] == positions[batch.row_N] + 1
    assert torch.equal(inputs[batch.row_N[inside] + 1], batch.target_N[inside])
    assert int((~inside).sum()) == len(tiny.items), "one row an item predicts the token that was left out"
    assert batch.row_N.unique().numel() == batch.row_N.numel()


@pytest.mark.parametrize("contrastive", [True, False])
def test_teachers_read_the_context_without_the_harmful_prefix(tiny: Tiny, contrastive: bool) -> None:
    batch = builder(contrastive=contrastive).build(tiny.items, tiny.plan, tiny.scores)
    runs = list(expected_runs(tiny.items, penalty=True))
    aligned_NH = torch.cat([tiny.hidden(tiny.aligned, run.teacher_context, run.tokens) for run in runs])
    assert batch.aligned_hidden_NH is not None
    torch.testing.assert_close(batch.aligned_hidden_NH, aligned_NH, **CLOSE)
    base_PH = torch.cat(
        [
            tiny.hidden(tiny.base, run.teacher_context, run.tokens)
            for run in runs
            if contrastive or run.kind is TokenKind.PENALTY
        ]
    )
    assert batch.base_hidden_PH is not None
    torch.testing.assert_close(batch.base_hidden_PH, base_PH, **CLOSE)
    settings = LossSettings(alpha=0.5 if contrastive else 0.0)
    assert int(needs_base(batch.kind_N, settings).sum()) == batch.base_hidden_PH.shape[0], "as the loss counts them"


def test_recovery_with_the_prefix_would_be_something_else(tiny: Tiny) -> None:
    """Guards the test above: the stripped and the whole context give different teachers here."""
    item = tiny.plan.recovery[0]
    sample = item.sample
    whole = sample.prompt_ids + sample.harmful_ids[: item.depth]
    stripped_TH = tiny.hidden(tiny.aligned, sample.teacher_prompt_ids, sample.refusal_ids)
    whole_TH = tiny.hidden(tiny.aligned, whole, sample.refusal_ids)
    assert (stripped_TH - whole_TH).abs().max() > 0.1


def test_every_sequence_is_packed_whole(tiny: Tiny) -> None:
    batch = builder().build(tiny.items, tiny.plan, tiny.scores)
    lengths = [length(item) for item in tiny.items]
    assert batch.input_ids_BT.shape[1] == max(lengths)
    assert batch.input_ids_BT.shape[0] < len(lengths), "else nothing shares a row, and this proves nothing"
    assert batch.num_tokens == sum(lengths)
    assert batch.num_tokens == sum(lengths)
    starts = (batch.position_ids_BT == 0).sum() - (batch.input_ids_BT.numel() - sum(lengths))
    assert int(starts) == len(lengths), "positions restart once a sequence, and stay 0 on padding"


def test_emphasis_scales_anchor_rows_and_the_penalty_by_depth(tiny: Tiny) -> None:
    by_depth = torch.linspace(0.5, 2.0, MAX_DEPTH)
    plain = builder().build(tiny.items, tiny.plan, tiny.scores)
    scaled = builder().build(tiny.items, tiny.plan, tiny.scores, Emphasis(3.0, by_depth))
    factor_N = scaled.weight_N / plain.weight_N
    assert set(factor_N[plain.kind_N == TokenKind.ANCHOR].tolist()) == {3.0}
    assert set(factor_N[plain.kind_N == TokenKind.RECOVERY].tolist()) == {1.0}
    expected = torch.cat([by_depth[: item.depth] for item in tiny.items if isinstance(item, RecoveryItem)])
    torch.testing.assert_close(factor_N[plain.kind_N == TokenKind.PENALTY], expected)


def test_the_penalty_by_depth_is_counted_from_after_a_turned_prefix(tiny: Tiny) -> None:
    turned = [RecoveryItem(replace(item.sample, refusal_prefix_tokens=1), item.depth) for item in tiny.plan.recovery]
    by_depth = torch.arange(1.0, MAX_DEPTH + 2)
    plain, scaled = (
        builder().build(turned, tiny.plan, tiny.scores, Emphasis(1.0, emphasis)) for emphasis in (None, by_depth)
    )
    is_penalty_N = plain.kind_N == TokenKind.PENALTY
    expected = torch.cat([by_depth[[0, *range(item.depth - 1)]] for item in turned])
    torch.testing.assert_close((scaled.weight_N / plain.weight_N)[is_penalty_N], expected)


def test_depths_name_recovery_items(tiny: Tiny) -> None:
    batch = builder().build(tiny.items, tiny.plan, tiny.scores)
    assert batch.depth_B.tolist() == [-1 if isinstance(item, AnchorItem) else item.depth for item in tiny.items]


@pytest.mark.parametrize(("world_size", "per_device_batch_size"), [(1, 8), (1, 3), (2, 4), (2, 1), (4, 2)])
def test_weights_are_a_mean_over_the_tokens_of_each_kind(
    tiny: Tiny, world_size: int, per_device_batch_size: int
) -> None:
    """DeepSpeed averages over workers and micro-batches; `scale` undoes that, so each kind's weights average to 1."""
    accumulation = -(-8 // world_size // per_device_batch_size)
    one = builder(scale=float(world_size * accumulation))
    sums: Counter[int] = Counter()
    for rank in range(world_size):
        share = tiny.plan.local(rank, world_size)
        parts = [share[start : start + per_device_batch_size] for start in range(0, len(share), per_device_batch_size)]
        assert len(parts) == accumulation
        for part in parts:
            batch = one.build(part, tiny.plan, tiny.scores)
            for kind, weight in zip(batch.kind_N.tolist(), batch.weight_N.tolist(), strict=True):
                sums[kind] += weight / one.scale
            assert {len(set(batch.weight_N[batch.kind_N == kind].tolist())) for kind in batch.kind_N.unique()} == {1}
    assert dict(sums) == pytest.approx({int(kind): 1.0 for kind in TokenKind})


@pytest.mark.parametrize("contrastive", [True, False])
def test_the_loss_does_not_depend_on_the_number_of_workers(tiny: Tiny, contrastive: bool) -> None:
    """Loss and gradient of a step, cut into workers and micro-batches several ways and averaged as DeepSpeed does."""
    settings = LossSettings(alpha=0.5 if contrastive else 0.0)
    teachers = {role: load_head(head_spec(getattr(tiny, role)), dtype=torch.float32) for role in ("base", "aligned")}
    lm = load_model(tiny.student, "float32")
    head = HeadSettings(1.0, None, teachers["base"].vocab_size)
    module = StudentModule(lm, head, teachers, settings, external_head=False)

    def step(world_size: int, per_device_batch_size: int) -> tuple[Tensor, Tensor]:
        accumulation = -(-8 // world_size // per_device_batch_size)
        one = builder(contrastive=contrastive, scale=float(world_size * accumulation))
        total = torch.zeros(())
        for rank in range(world_size):
            share = tiny.plan.local(rank, world_size)
            for start in range(0, len(share), per_device_batch_size):
                batch = one.build(share[start : start + per_device_batch_size], tiny.plan, tiny.scores)
                total = total + to_loss_output(module(batch)).total / (world_size * accumulation)
        (gradient,) = torch.autograd.grad(total, [lm.get_output_embeddings().weight])
        return total.detach(), gradient

    total, gradient = step(1, 8)
    assert gradient.abs().max() > 1e-3
    for world_size, per_device_batch_size in ((1, 3), (2, 2), (4, 2)):
        other_total, other_gradient = step(world_size, per_device_batch_size)
        torch.testing.assert_close(other_total, total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_sft_needs_no_scores(tiny: Tiny) -> None:
    plan = StepPlan(tiny.plan.anchor, ())
    batch = builder(penalty=False).build(plan.local(0, 1), plan, None)
    assert batch.aligned_hidden_NH is None
    assert batch.base_hidden_PH is None
    answers = [item.sample.answer_ids for item in plan.local(0, 1) if isinstance(item, AnchorItem)]
    assert batch.target_N.tolist() == [token for answer in answers for token in answer]
    assert float(batch.weight_N.sum()) == pytest.approx(1.0)


def test_a_batch_of_one_kind_has_no_other(tiny: Tiny) -> None:
    batch = builder().build(list(tiny.plan.anchor), tiny.plan, tiny.scores)
    assert set(batch.kind_N.tolist()) == {int(TokenKind.ANCHOR)}
    assert batch.base_hidden_PH is None
    # Still weighted by the counts of the whole step, not of this micro-batch.
    assert float(batch.weight_N[0]) == pytest.approx(1 / tiny.plan.num_anchor_tokens)


@pytest.mark.parametrize(("tokens", "weight"), [(1, 8.0), (2, 3.5), (100, 4.0), (2, 1.0)])
def test_the_opening_of_an_answer_counts_more_and_the_anchor_stays_a_mean(
    tiny: Tiny, tokens: int, weight: float
) -> None:
    opening = OpeningConfig(tokens=tokens, weight=weight)
    batch = replace(builder(scale=2.0), opening=opening).build(tiny.items, tiny.plan, tiny.scores, Emphasis(anchor=3.0))
    plain = builder(scale=2.0).build(tiny.items, tiny.plan, tiny.scores, Emphasis(anchor=3.0))
    anchor_N = batch.kind_N == TokenKind.ANCHOR
    raw = [
        weight if position < tokens else 1.0
        for item in tiny.items
        if isinstance(item, AnchorItem)
        for position in range(len(item.sample.answer_ids))
    ]
    expected = 6.0 * torch.tensor(raw, dtype=torch.float64) / sum(raw)
    torch.testing.assert_close(batch.weight_N[anchor_N].double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(batch.weight_N[~anchor_N], plain.weight_N[~anchor_N], rtol=0.0, atol=0.0)


def test_the_opening_is_the_same_over_micro_batches(tiny: Tiny) -> None:
    opened = replace(builder(), opening=OpeningConfig(tokens=2, weight=5.0))
    whole = opened.build(tiny.items, tiny.plan, tiny.scores)
    halves = [opened.build(part, tiny.plan, tiny.scores) for part in (tiny.items[:3], tiny.items[3:])]
    torch.testing.assert_close(torch.cat([half.weight_N for half in halves]), whole.weight_N, rtol=0.0, atol=0.0)


def test_a_batch_moves_whole(tiny: Tiny) -> None:
    batch = builder().build(tiny.items, tiny.plan, tiny.scores)
    moved: dict[str, Any] = vars(batch.to(torch.device("meta")))
    tensors = {name: value for name, value in moved.items() if isinstance(value, Tensor)}
    assert {name for name, value in tensors.items() if value.device.type != "meta"} == set()
    assert len(tensors) > 5
    assert moved.keys() == vars(batch).keys()
