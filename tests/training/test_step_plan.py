"""Step plans: deterministic, complete over an epoch, and the same for any number of workers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import AnchorItem, DepthConfig, RecoveryItem
from raycomplete.runtime.types import PromptKind
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.step_plan import Planner, StepPlan, StepSequences
from tests.training.tiny import completion, make_samples

DEPTH = DepthConfig(schedule="adaptive", min=1, max=16, bins=4)


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


def test_a_resumed_run_goes_on_with_the_very_next_samples() -> None:
    one, sampler = planner(make_samples(0)), DepthSampler(DEPTH, 0)
    plans = []
    for step in range(6):
        plans.append(one.plan(step, sampler))
        if step == 2:
            saved = sampler.state_dict()
        sampler.update([1.0 + step, 0, 2.0, 0], [1, 0, 1, 0])
    resumed = DepthSampler(DEPTH, 0)
    resumed.load_state_dict(saved)
    other = planner(make_samples(0))
    for step in range(2, 6):
        assert other.plan(step, resumed) == plans[step]
        resumed.update([1.0 + step, 0, 2.0, 0], [1, 0, 1, 0])


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


@pytest.mark.parametrize("kind", ["borderline", "benign"])
def test_a_share_of_borderline_prompts_is_ignored_where_there_is_one_kind(kind: PromptKind) -> None:
    samples = make_samples(1)
    samples = replace(samples, anchor=tuple(replace(sample, kind=kind) for sample in samples.anchor))
    sizes = {"anchor_batch_size": 4, "recovery_batch_size": 4, "seed": 0}
    assert Planner(samples, **sizes, borderline_fraction=0.5).samples_of(3) == planner(samples).samples_of(3)


def test_samples_are_known_before_their_depths() -> None:
    one = planner(make_samples(0))
    for step in (0, 3, 11):
        plan = one.plan(step, DepthSampler(DEPTH, 0))
        assert one.samples_of(step) == (
            [item.sample for item in plan.anchor],
            [item.sample for item in plan.recovery],
        )


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


def test_token_counts_are_those_of_the_whole_step() -> None:
    anchor = AnchorItem(AnchorSample("a", (1, 2), (3, 4, 5)))
    recovery = RecoveryItem(RecoverySample("r", (1, 2, 3), (9, 1, 2, 3), (4, 5, 6, 7), (8, 8)), depth=2)
    step = StepSequences.of(StepPlan((anchor, anchor), (recovery,)), completion())
    assert step.normalisers == {"anchor": 6, "recovery": 2, "push_forward": 1, "opening": 1}
    # The last token predicts nothing, so it is not read: 2 + 3 - 1, and 3 + 2 of h + 2 - 1.
    assert [len(item) for item in step.micro_batches(0, 1, 1)[0]] == [6, 4, 4]
    assert step.num_tokens == 7 + 5 + 5


def test_without_recovery_samples_only_the_anchor_is_drawn() -> None:
    plan = plan_at(0, samples=SampleSet(make_samples(0).anchor))
    assert len(plan.anchor) == 4
    assert plan.recovery == ()
    assert StepSequences.of(plan, completion()).normalisers.keys() == {"anchor"}
