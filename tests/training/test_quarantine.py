"""Sequences that a frozen model cannot read: their step trains the others as if nothing had happened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raycomplete.losses.loss import LossOutput
from raycomplete.methods.completion import LossWeights
from raycomplete.methods.registry import AnchorItem, Item, RecoveryItem
from raycomplete.runtime.errors import QuarantinedSequenceError
from raycomplete.training.batches import BatchBuilder, cut_harmful
from raycomplete.training.step_plan import StepPlan, StepSequences
from raycomplete.training.validation import scored_batches
from tests.training.tiny import LocalScores, completion, make_model, make_samples, make_student, prefetcher_of

METHOD = completion(weights=LossWeights(penalty=1.0))
LOSS = METHOD.loss()
SAMPLES = make_samples(3, anchor=3, recovery=3)
SAMPLES = replace(SAMPLES, recovery=cut_harmful(SAMPLES.recovery, 9))
PLAN = StepPlan(
    tuple(AnchorItem(sample) for sample in SAMPLES.anchor),
    tuple(RecoveryItem(sample, depth) for sample, depth in zip(SAMPLES.recovery, (2, 5, 9), strict=True)),
)


class Fragile(LocalScores):
    """A frozen model whose scorer dies of some sequences."""

    def __init__(self, path: Path, deadly: set[tuple[int, ...]]) -> None:
        super().__init__(path)
        self._deadly = deadly

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        found: list[Any] = [None if tokens in self._deadly else 0 for tokens, _ in reference]
        good = iter(super().collect_tensors([item for item, hole in zip(reference, found, strict=True) if hole == 0]))
        partial = [None if hole is None else next(good) for hole in found]
        if None in found:
            raise QuarantinedSequenceError("1 of 9 sequences was quarantined.", partial=partial)
        return partial


@dataclass
class Tiny:
    """Base, aligned and a student on disk."""

    base: Path
    aligned: Path
    student: Path

    def gradient(
        self, items: Sequence[Item], deadly: dict[str, set[tuple[int, ...]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of the output head over one micro-batch of the step."""
        sources = {role: Fragile(getattr(self, role), deadly.get(role, set())) for role in ("base", "aligned")}
        prefetcher = prefetcher_of(METHOD, sources)
        prefetcher.request(0, SAMPLES.anchor, SAMPLES.recovery)
        normalisers = StepSequences.of(PLAN, METHOD).normalisers
        sequences = [METHOD.sequence(item) for item in items]
        batch = BatchBuilder(LOSS, scale=1.0).build(sequences, normalisers, prefetcher.take(0))
        module = make_student(self.student, LOSS, self.base.parent)
        total = LossOutput.unflatten(module(batch), LOSS).total
        (gradient,) = torch.autograd.grad(total, [module.lm.get_output_embeddings().weight])
        return total.detach(), gradient


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("models")
    return Tiny(*(make_model(folder / role, seed) for seed, role in enumerate(("base", "aligned", "student"))))


@pytest.mark.parametrize(
    ("role", "part", "culprit"), [("aligned", "answer", 1), ("aligned", "refusal", 4), ("base", "h", 5)]
)
def test_the_others_are_trained_as_if_it_had_not_been_there(
    tiny: Tiny, role: str, part: str, culprit: int, caplog: pytest.LogCaptureFixture
) -> None:
    items: list[Item] = [*PLAN.anchor, *PLAN.recovery]
    deadly = {role: {tokens_of(items[culprit], part)}}
    with caplog.at_level(logging.WARNING):
        total, gradient = tiny.gradient(items, deadly)
    assert "was quarantined" in caplog.text
    without = [item for index, item in enumerate(items) if index != culprit]
    expected_total, expected_gradient = tiny.gradient(without, {})
    torch.testing.assert_close(total, expected_total, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)
    assert float(tiny.gradient(items, {})[0]) != pytest.approx(float(total), rel=1e-3)

    alone_total, alone_gradient = tiny.gradient([items[culprit]], deadly)  # every worker makes every forward pass
    assert float(alone_total) == 0
    assert not alone_gradient.any()


def test_the_profile_leaves_it_out(tiny: Tiny) -> None:
    first, *others = SAMPLES.profile
    deadly = {first.prompt_ids + first.answer_ids}
    sources = {"aligned": LocalScores(tiny.aligned), "base": Fragile(tiny.base, deadly)}
    samples, (batch,) = scored_batches(SAMPLES.profile, sources, 4, "penalty", packed=True)  # type: ignore[arg-type]
    assert samples == others
    assert batch.token_N.tolist() == [token for sample in others for token in sample.answer_ids]


def test_ranks_profile_the_same_samples(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_rank_lacks_the_second(ranks: list[set[int]], mine: set[int]) -> None:
        ranks[:] = [mine, mine - {1}]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", another_rank_lacks_the_second)
    sources = {role: LocalScores(getattr(tiny, role)) for role in ("base", "aligned")}
    samples, _ = scored_batches(SAMPLES.profile, sources, 4, "penalty", packed=True)  # type: ignore[arg-type]
    assert samples == [*SAMPLES.profile[:1], *SAMPLES.profile[2:]]


def tokens_of(item: Item, part: str) -> tuple[int, ...]:
    if isinstance(item, AnchorItem):
        return item.sample.prompt_ids + item.sample.answer_ids
    if part == "h":
        return item.sample.prompt_ids + item.sample.harmful_ids
    return item.sample.teacher_prompt_ids + item.sample.refusal_ids
