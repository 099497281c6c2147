"""Micro-batches: every trained row stands beside the right hidden states, targets and weight.

What is expected is computed by plain transformers forward passes of single, unpadded sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import RecoverySample, SampleSet
from raycomplete.losses.loss import LossOutput
from raycomplete.losses.settings import LossSettings
from raycomplete.methods.completion import LossWeights
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    Method,
    RecoveryItem,
    RowSpan,
    TeacherContext,
    TrainSequence,
)
from raycomplete.training.batches import BatchBuilder, MicroBatch, cut_harmful
from raycomplete.training.step_plan import StepPlan, StepSequences
from raycomplete.training.teacher_prefetcher import Scores
from tests.training.tiny import LocalScores, completion, make_model, make_samples, make_student, prefetcher_of

MAX_DEPTH = 9
ANCHOR, RECOVERY, PUSH_FORWARD, OPENING = range(4)
LOSS: LossSettings = completion().loss()
CONTRASTIVE = completion(contrastive_alpha=0.5)
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
        """Longest first, as a step trains them."""
        items: list[Item] = [*self.plan.anchor, *self.plan.recovery]
        return sorted(items, key=lambda item: len(completion().sequence(item)), reverse=True)

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
    samples = replace(samples, recovery=cut_harmful(samples.recovery, MAX_DEPTH))
    # The teacher of one sample reads a safety prompt that the student does not see.
    privileged = replace(samples.recovery[1], teacher_prompt_ids=(77, 78, *samples.recovery[1].prompt_ids))
    samples = replace(samples, recovery=(samples.recovery[0], privileged, *samples.recovery[2:]))
    plan = StepPlan(
        tuple(AnchorItem(sample) for sample in samples.anchor),
        tuple(RecoveryItem(sample, depth) for sample, depth in zip(samples.recovery, DEPTHS, strict=True)),
    )
    return Tiny(base, aligned, student, plan, scores_of(samples, base, aligned))


def scores_of(samples: SampleSet, base: Path, aligned: Path) -> Scores:
    reads_all = completion(contrastive_alpha=0.5, weights=LossWeights(penalty=1.0))
    prefetcher = prefetcher_of(reads_all, {"base": LocalScores(base), "aligned": LocalScores(aligned)})
    prefetcher.request(0, samples.anchor, samples.recovery)
    return prefetcher.take(0)


def build(
    tiny: Tiny,
    method: Method | None = None,
    items: list[Item] | None = None,
    *,
    scale: float = 1.0,
    loss_weights: Mapping[str, float] | None = None,
    scores: Scores | None = None,
) -> MicroBatch:
    """A micro-batch of some items of the step, by default all, by default of the method `completion`."""
    method = method or completion()
    normalisers = StepSequences.of(tiny.plan, method).normalisers
    sequences = [method.sequence(item) for item in (tiny.items if items is None else items)]
    builder = BatchBuilder(method.loss(), scale)
    return builder.build(sequences, normalisers, scores or tiny.scores, loss_weights)


@dataclass
class Run:
    """A run of rows as it should be: the response `tokens` of an item after what the student read before.

    `offset` tokens of the response are left out. What aligned says to `target`, a context and a token after it, stands
    beside every row, where it is given.
    """

    item: int
    term: int
    context: tuple[int, ...]
    tokens: tuple[int, ...]
    teacher_context: tuple[int, ...]
    offset: int = 0
    target: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens that are trained."""
        return self.tokens[self.offset :]


def expected_runs(items: list[Item], *, push_forward: bool) -> Iterator[Run]:
    for index, item in enumerate(items):
        if isinstance(item, AnchorItem):
            prompt = item.sample.prompt_ids
            yield Run(index, ANCHOR, prompt, item.sample.answer_ids, prompt)
            continue
        sample: RecoverySample = item.sample
        h = sample.harmful_ids[: item.depth]
        if push_forward and item.depth > 1:
            target = (sample.teacher_prompt_ids, sample.refusal_ids[:1])
            yield Run(index, PUSH_FORWARD, sample.prompt_ids, h, sample.teacher_prompt_ids, 1, target)
        yield Run(index, OPENING, sample.prompt_ids, sample.refusal_ids[:1], ())
        context = sample.prompt_ids + h
        yield Run(index, RECOVERY, context, sample.refusal_ids, sample.teacher_prompt_ids)


def student_rows(tiny: Tiny, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        hidden_BTH = load_model(tiny.student, "float32").base_model(**batch.model_inputs()).last_hidden_state
    rows_NH: Tensor = hidden_BTH.flatten(0, 1)[batch.row_N]
    return rows_NH


@pytest.mark.parametrize("push_forward", [True, False])
def test_student_rows_tokens_and_terms_line_up(tiny: Tiny, push_forward: bool) -> None:
    items = tiny.items
    batch = build(tiny, completion(weights=LossWeights(opening=0.3, push_forward=0.1 if push_forward else 0.0)))
    runs = list(expected_runs(items, push_forward=push_forward))
    hidden_NH = torch.cat([tiny.hidden(tiny.student, run.context, run.tokens)[run.offset :] for run in runs])
    torch.testing.assert_close(student_rows(tiny, batch), hidden_NH, **CLOSE)
    assert batch.token_N.tolist() == [token for run in runs for token in run.rows]
    assert batch.term_N.tolist() == [run.term for run in runs for _ in run.rows]
    assert batch.sequence_N.tolist() == [run.item for run in runs for _ in run.rows]


@pytest.mark.parametrize("contrastive", [True, False])
def test_teachers_read_the_context_without_the_harmful_prefix(tiny: Tiny, contrastive: bool) -> None:
    batch = build(tiny, CONTRASTIVE if contrastive else None)
    runs = [run for run in expected_runs(tiny.items, push_forward=True) if run.term != OPENING]
    aligned_NH = torch.cat(
        [
            tiny.hidden(tiny.aligned, run.teacher_context, run.tokens)
            if run.target is None
            else tiny.hidden(tiny.aligned, *run.target).expand(len(run.rows), -1)
            for run in runs
        ]
    )
    assert batch.aligned_hidden_PH is not None
    torch.testing.assert_close(batch.aligned_hidden_PH, aligned_NH, **CLOSE)
    if not contrastive:
        assert batch.base_hidden_PH is None
        return
    base = [tiny.hidden(tiny.base, run.teacher_context, run.tokens) for run in runs if run.term != PUSH_FORWARD]
    assert batch.base_hidden_PH is not None
    torch.testing.assert_close(batch.base_hidden_PH, torch.cat(base), **CLOSE)


@pytest.mark.parametrize("contrastive", [True, False])
def test_the_loss_does_not_depend_on_the_number_of_workers(tiny: Tiny, contrastive: bool) -> None:
    """Loss and gradient of a step, cut into workers and micro-batches several ways and averaged as DeepSpeed does."""
    method = CONTRASTIVE if contrastive else completion()
    settings = method.loss()
    module = make_student(tiny.student, settings, tiny.base.parent)
    sequences = StepSequences.of(tiny.plan, method)

    def step(world_size: int, per_device_batch_size: int) -> tuple[Tensor, Tensor]:
        accumulation = -(-8 // world_size // per_device_batch_size)
        builder = BatchBuilder(settings, float(world_size * accumulation))
        total = torch.zeros(())
        for rank in range(world_size):
            share = sequences.micro_batches(rank, world_size, 1)[0]
            for start in range(0, len(share), per_device_batch_size):
                part = share[start : start + per_device_batch_size]
                batch = builder.build(part, sequences.normalisers, tiny.scores)
                total = total + LossOutput.unflatten(module(batch), settings).total / (world_size * accumulation)
        (gradient,) = torch.autograd.grad(total, [module.lm.get_output_embeddings().weight])
        return total.detach(), gradient

    total, gradient = step(1, 8)
    assert gradient.abs().max() > 1e-3
    for world_size, per_device_batch_size in ((1, 3), (2, 2), (4, 2)):
        other_total, other_gradient = step(world_size, per_device_batch_size)
        torch.testing.assert_close(other_total, total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("count", "weight"), [(1, 8.0), (2, 3.5), (100, 4.0), (2, 1.0)])
def test_first_tokens_of_an_answer_count_more_and_the_anchor_stays_a_mean(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, count: int, weight: float
) -> None:
    loss_weights = {"anchor": 3.0}
    monkeypatch.setattr("raycomplete.methods.completion.FIRST_TOKENS", count)
    method = completion(first_token_weight=weight)
    batch, plain = (build(tiny, found, scale=2.0, loss_weights=loss_weights) for found in (method, None))
    anchor_N = batch.term_N == ANCHOR
    raw = [
        weight if position < count else 1.0
        for item in tiny.items
        if isinstance(item, AnchorItem)
        for position in range(len(item.sample.answer_ids))
    ]
    expected = 6.0 * torch.tensor(raw, dtype=torch.float64) / sum(raw)
    torch.testing.assert_close(batch.weight_N[anchor_N].double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(batch.weight_N[~anchor_N], plain.weight_N[~anchor_N], rtol=0.0, atol=0.0)


def test_a_sequence_whose_shared_target_could_not_be_read_keeps_its_place_without_rows() -> None:
    sample, other = make_samples(0).recovery[:2]
    read = RowSpan("recovery", 2, 3, TeacherContext((1, 2), (3, 4, 5)))
    scores = {("aligned", (1, 2, 3, 4, 5), 2): torch.randn(3, 8)}
    sequences = [TrainSequence((1, 2, 3, 4, 5), (read,))]
    for item in (RecoveryItem(sample, 4), RecoveryItem(other, 4)):
        sequences.append(completion().sequence(item))
        for role, tokens in (("aligned", item.sample.refusal_ids), ("base", item.sample.harmful_ids)):
            num_rows = 0 if role == "aligned" and item.sample is sample else len(tokens)  # quarantined
            prompt = item.sample.prompt_ids
            scores[(role, prompt + tokens, len(prompt))] = torch.randn(num_rows, 8)
    batch = BatchBuilder(LOSS, 1.0).build(sequences, {}, Scores(scores, 0.0))
    assert set(batch.sequence_N.tolist()) == {0, 2}
    assert len(batch.depth_S) == 3
