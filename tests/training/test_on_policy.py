"""Rollout batches and plans: what the student is asked to continue, and what its rollouts are trained as."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.config import RolloutConfig, TrainConfig
from raycomplete.engines.weights import WeightsLostError
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import TeacherContext
from raycomplete.training import on_policy
from raycomplete.training.job import TrainJob
from raycomplete.training.on_policy import OnPolicySource, Rollout, RolloutBatch, RolloutPlanner, compliance_by_bin
from raycomplete.training.step_plan import DepthSampler, Planner
from tests.training.tiny import FourBins, completion, make_samples

DEPTH = FourBins(schedule="adaptive", min=1, max=8)
SAMPLES = make_samples(0)


def planner(seed: int = 0, trained: int = 8) -> RolloutPlanner:
    planner = Planner(SAMPLES, anchor_batch_size=8, recovery_batch_size=8, seed=seed)
    return RolloutPlanner(planner, RolloutConfig(max_refusal_tokens=4), seed, trained)


def answers(batch: RolloutBatch, start: int | None = None, *, refused: bool = False) -> list[Rollout]:
    return [Rollout((90, 91, 92, 93), (1,), refused, version=2, refusal_start=start) for _ in batch.sequences()]


def test_a_rollout_batch_is_a_function_of_seed_step_and_sampler_state() -> None:
    sampler, warmed = DepthSampler(DEPTH, 0), DepthSampler(DEPTH, 0)
    assert planner().draw(3, sampler) == planner().draw(3, sampler) != planner().draw(4, sampler)
    assert planner().seed_of(3) == planner().seed_of(3) != planner().seed_of(4)
    assert planner(seed=1).seed_of(3) != planner().seed_of(3)
    warmed.update([0, 0, 0, 9.0], [1, 1, 1, 1])
    assert planner().draw(3, warmed).depths != planner().draw(3, sampler).depths


def test_seeds_of_two_batches_never_overlap() -> None:
    seeds = sorted(planner().seed_of(step) for step in range(500))
    assert np.diff(seeds).min() >= 2**20
    assert seeds[-1] + 2**20 < 2**63


def test_the_student_reads_the_prompt_and_the_start_of_the_response() -> None:
    batch = planner().draw(0, DepthSampler(DEPTH, 0))
    assert len(batch.recovery) == len(batch.anchor) == 8
    expected = [
        [*sample.prompt_ids, *sample.harmful_ids[:depth]]
        for sample, depth in zip(batch.recovery, batch.depths, strict=True)
    ]
    assert batch.sequences() == expected, "aligned's answers to harmless prompts stay"
    graded = replace(batch, is_graded=True).sequences()
    assert graded == expected + [list(sample.prompt_ids) for sample in batch.anchor]
    plan = planner().finish(batch, answers(batch))
    assert tuple(item.sample for item in plan.anchor) == batch.anchor


@pytest.mark.parametrize("start", [0, 3])
def test_a_refusal_is_distilled_where_it_begins_and_the_words_before_it_become_part_of_h(start: int) -> None:
    """The teacher reads r as the start of its own answer, so no word of compliance may stand in it. Within an answer
    the word that starts a refusal is another token than at its start, so the opening stays that of aligned.
    """
    batch = planner().draw(0, DepthSampler(DEPTH, 0))
    items = planner().finish(batch, answers(batch, start, refused=True)).recovery
    method = Completion.model_validate({"weights": {"opening": 0.3}})
    for item, sample, depth in zip(items, batch.recovery, batch.depths, strict=True):
        assert item.depth == depth + start
        assert item.sample.harmful_ids[: item.depth] == (*sample.harmful_ids[:depth], 90, 91, 92)[: depth + start]
        assert item.sample.refusal_ids == ((90, 91, 92, 93) if start == 0 else (93, 1)), "at most 4 tokens"
        context = TeacherContext(sample.teacher_prompt_ids, item.sample.refusal_ids)
        assert Completion().sequence(item).spans[-1].context == context
        (opening,) = (span for span in method.sequence(item).spans if span.term == "opening")
        assert opening.token_ids == sample.refusal_ids[:1]


@pytest.mark.parametrize(("refused", "start"), [(True, None), (False, None), (False, 2)])
def test_compliance_is_answered_by_the_refusal_of_aligned(refused: bool, start: int | None) -> None:
    """So is a refusal whose start the judge cannot tell."""
    batch = planner().draw(0, DepthSampler(DEPTH, 0))
    items = planner().finish(batch, answers(batch, start, refused=refused)).recovery
    assert [(item.sample, item.depth) for item in items] == list(zip(batch.recovery, batch.depths, strict=True))


def test_what_still_complies_is_trained_first() -> None:
    few = planner(trained=5)
    batch = few.draw(0, DepthSampler(DEPTH, 0))
    rollouts = answers(batch)
    for index in (0, 1, 4, 6, 7):
        rollouts[index] = replace(rollouts[index], refused=True, refusal_start=2 * (index == 6))  # the others at once
    trained = [item.sample.sample_id for item in few.finish(batch, rollouts).recovery]
    assert trained == [batch.recovery[index].sample_id for index in (2, 3, 5, 6, 0)], "then late refusals"


def test_compliance_is_counted_by_the_depth_of_the_prefill() -> None:
    sampler = DepthSampler(DEPTH, 0)
    batch = replace(planner().draw(0, sampler), depths=(1, 2, 3, 4, 4, 8, 8, 0))
    rollouts = [Rollout((9,), (), refused, 0) for refused in (True, False, False, False, True, True, False, False)]
    assert compliance_by_bin(batch, rollouts, sampler) == ([1, 2, 0, 1], [2, 3, 0, 2]), "none at depth 0"


class DyingEngines:
    """Engines of which one dies with sent weights in it while it rolls out a step."""

    def __init__(self, dies_at: int) -> None:
        self.dies_at, self.version, self.is_sending = dies_at, -1, True
        self.submitted: list[tuple[int, int, tuple[int, ...]]] = []
        self.updates: list[tuple[int, bool]] = []

    def update(self, version: int) -> dict[str, Any]:
        self.updates.append((version, self.is_sending))
        self.version = version
        return {"seconds": 1.0, "version": version}

    def submit(self, batch: RolloutBatch, seed: int) -> Any:
        self.submitted.append((batch.step, seed, batch.depths))
        return batch, self.version, [step for step, _, _ in self.submitted].count(batch.step)

    def collect(self, reference: Any) -> list[Rollout]:
        batch, version, times = reference
        if batch.step == self.dies_at and times == 1:
            raise WeightsLostError(f"The weights of version {version} are gone.")
        return [replace(item, version=version) for item in answers(batch)]


def source(
    monkeypatch: pytest.MonkeyPatch, dies_at: int = 99, *, use_gpu: bool = False, every: int = 25, **rollout: Any
) -> tuple[OnPolicySource, DyingEngines]:
    monkeypatch.setattr(on_policy, "from_rank_zero", lambda work: work())
    engines, unused = DyingEngines(dies_at), SimpleNamespace()
    job = TrainJob(
        method=completion(),
        train=TrainConfig(steps=4, checkpoint_every=every),
        rollout=RolloutConfig(on_policy=True, **rollout),
        student_engines=engines,
        use_gpu=use_gpu,
        **dict.fromkeys(("start", "output", "folder", "samples", "dtype", "student_head"), unused),  # type: ignore[arg-type]
    )
    ignore: Any = SimpleNamespace(
        warm=lambda *_: None, request=lambda *_: None, take=lambda _: SimpleNamespace(wait_s=0.0)
    )
    drawn = Planner(SAMPLES, anchor_batch_size=4, recovery_batch_size=8, seed=0)
    return OnPolicySource(job, drawn, ignore, DepthSampler(DEPTH, 0), 0, 1), engines


@pytest.mark.parametrize(("sync_every", "checkpoint_every", "stops"), [(1, 25, [1, 2, 3, 4, 5]), (3, 4, [3, 4])])
def test_a_run_stops_only_where_its_engines_get_new_weights(
    sync_every: int, checkpoint_every: int, stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = source(monkeypatch, every=checkpoint_every, sync_every=sync_every)
    assert [step for step in range(1, 6) if made.can_stop(step)] == stops


@pytest.mark.parametrize(("use_gpu", "colocated"), [(True, True), (True, False), (False, True)])
def test_a_trainer_makes_room_on_a_shared_gpu_before_an_engine_wakes(
    use_gpu: bool, colocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, engines = source(monkeypatch, use_gpu=use_gpu, colocated=colocated)
    room: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: room.append(engines.version))
    made.next(0)
    assert room == ([-1] if use_gpu and colocated else [])


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("dies_at", [0, 2])
def test_rollouts_whose_weights_died_with_an_engine_are_made_again_by_present_ones(
    dies_at: int, colocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rollout may come from a version that nobody named, and none is missing."""
    made, engines = source(monkeypatch, dies_at, colocated=colocated)
    rows = [made.next(step).stats for step in range(4)]
    first, second = (item for item in engines.submitted if item[0] == dies_at)
    assert first == second, "the same sequences under the same seeds"
    assert len(engines.submitted) == 5
    assert engines.updates[-1][1] is False
    assert [item for item in engines.updates if item[0] < dies_at] == [(step, True) for step in range(dies_at)]
    assert (dies_at, False) in engines.updates
    assert [row["sync"]["version"] for row in rows] == [0, 1, 2, 3]
    ahead = 0 if colocated else 1
    assert [row["staleness"] for row in rows] == [0 if step in (0, dies_at) else ahead for step in range(4)]


def test_a_checkpoint_leaves_out_rollouts_whose_weights_died(monkeypatch: pytest.MonkeyPatch) -> None:
    for dies_at, kept in ((1, []), (9, [1])):
        made, _ = source(monkeypatch, dies_at)
        made.next(0)
        assert [item["step"] for item in made.state_dict()["rollouts"]] == kept
