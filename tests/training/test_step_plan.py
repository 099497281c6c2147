"""Step plans: deterministic, complete over an epoch, and the same for any number of workers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan, StepSequences
from tests.training.tiny import FourBins, completion, make_samples

DEPTH = FourBins(schedule="adaptive", min=1, max=16)


def planner(samples: SampleSet, seed: int = 0, anchor: int = 4, recovery: int = 4) -> Planner:
    return Planner(samples, anchor_batch_size=anchor, recovery_batch_size=recovery, seed=seed)


def plan_at(step: int, seed: int = 0, samples: SampleSet | None = None) -> StepPlan:
    return planner(samples or make_samples(0), seed).plan(step, DepthSampler(DEPTH, seed))


def test_a_plan_is_a_function_of_seed_step_and_sampler_state() -> None:
    assert plan_at(5) == plan_at(5)
    assert plan_at(5) != plan_at(6)
    assert plan_at(5) != plan_at(5, seed=1)
    warmed = DepthSampler(DEPTH, 0)
    warmed.update([0.0, 0.0, 0.0, 9.0], [1, 1, 1, 1])
    moved = planner(make_samples(0)).plan(5, warmed)
    assert [item.sample for item in moved.recovery] == [item.sample for item in plan_at(5).recovery]
    assert [item.depth for item in moved.recovery] != [item.depth for item in plan_at(5).recovery]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 3), (5, 5), (3, 8)])
def test_every_sample_is_seen_once_an_epoch(size: int, batch: int) -> None:
    samples = make_samples(1, anchor=size, recovery=size)
    one = planner(samples, anchor=batch, recovery=batch)
    steps = math.lcm(size, batch) // batch
    drawn = [one.samples_of(step) for step in range(2 * steps)]
    for part in (0, 1):
        order = [sample.sample_id for step in drawn for sample in step[part]]
        epochs = [order[start : start + size] for start in range(0, len(order), size)]
        assert all(len(set(epoch)) == size for epoch in epochs), "a batch may cross an epoch's end, nothing is lost"
        assert len(set(map(tuple, epochs))) > 1, "each epoch is shuffled anew"
    assert [s.sample_id[1:] for s in drawn[0][0]] != [s.sample_id[1:] for s in drawn[0][1]], "orders are independent"


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5])
def test_borderline_prompts_have_their_share_of_the_anchor_sequences(fraction: float) -> None:
    samples = make_samples(1, anchor=30)
    kinds = ["borderline" if number % 10 == 0 else "benign" for number in range(30)]
    anchor = tuple(replace(sample, kind=kind) for sample, kind in zip(samples.anchor, kinds, strict=True))
    sizes = {"anchor_batch_size": 8, "recovery_batch_size": 4, "seed": 0}
    one = Planner(replace(samples, anchor=anchor), **sizes, borderline_fraction=fraction)
    drawn = [one.samples_of(step)[0] for step in range(60)]
    assert {len(step) for step in drawn} == {8}
    if fraction == 0.3:
        first = Counter(step[0].kind for step in drawn)
        assert 6 <= first["borderline"] <= 32, "no kind has a place of its own: groups of rollouts take the first ones"
    borderline = [[sample for sample in step if sample.kind == "borderline"] for step in drawn]
    assert {len(step) for step in borderline} <= {math.floor(8 * fraction), math.ceil(8 * fraction)}
    assert sum(map(len, borderline)) == 480 * fraction
    for kind in ("borderline", "benign"):
        times = Counter(sample.sample_id for step in drawn for sample in step if sample.kind == kind)
        assert not times or max(times.values()) - min(times.values()) <= 1, "every sample in turn"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slices_of_ranks_partition_the_plan(world_size: int) -> None:
    step = StepSequences.of(plan_at(3), completion())
    shares = [step.micro_batches(rank, world_size, 1)[0] for rank in range(world_size)]
    assert {len(share) for share in shares} == {8 // world_size}, "equal shares, or collectives hang"
    together = Counter(id(item) for share in shares for item in share)
    assert together == Counter(id(item) for item in chain(*step.anchor, *step.recovery))
    for share in shares:
        assert [len(item) for item in share] == sorted(map(len, share), reverse=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_asks_for_the_scores_of_its_own_share(world_size: int) -> None:
    """The worker slices `samples_of` while the depths are still unknown; both slices must agree."""
    one = planner(make_samples(0))
    step = StepSequences.of(one.plan(2, DepthSampler(DEPTH, 0)), completion())
    anchor, recovery = one.samples_of(2)
    for rank in range(world_size):
        asked = {sample.prompt_ids + sample.answer_ids for sample in anchor[rank::world_size]}
        asked |= {sample.teacher_prompt_ids + sample.refusal_ids for sample in recovery[rank::world_size]}
        contexts = [share.spans[-1].context for share in step.micro_batches(rank, world_size, 1)[0]]
        assert asked == {context.prompt_ids + context.response_ids for context in contexts if context is not None}


def test_depths_stay_within_the_continuation() -> None:
    short = tuple(RecoverySample(f"r{i}", (1,), (1,), tuple(range(2, 4 + i)), (7,)) for i in range(6))
    samples = SampleSet((AnchorSample("a", (1,), (2,)),), short)
    one = planner(samples, anchor=1, recovery=6)
    depths = [item for step in range(30) for item in one.plan(step, DepthSampler(DEPTH, 0)).recovery]
    assert all(1 <= item.depth <= len(item.sample.harmful_ids) for item in depths)
    assert {item.depth for item in depths} == {1, 2, 3, 4, 5, 6, 7}
