"""Step plans, drawn depths, packing and dealing: deterministic, complete, the same for any number of workers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import DepthConfig
from raycomplete.training.batches import pack
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan, StepSequences, deal
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


def sampler(seed: int = 0, *, min: int = 1, max: int = 64, schedule: str = "adaptive", **constants) -> DepthSampler:
    config = type("Depths", (DepthConfig,), constants)
    return DepthSampler(config(min=min, max=max, schedule=schedule), seed)


@given(low=st.integers(1, 40), span=st.integers(0, 80), bins=st.integers(1, 20))
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_bins_partition_the_depths(low, span, bins):
    subject = sampler(min=low, max=low + span, bins=bins)
    assert subject.num_bins == min(bins, span + 1)
    sizes = [last - first + 1 for first, last in subject.bin_ranges]
    assert sum(sizes) == span + 1
    assert max(sizes) - min(sizes) <= 1
    for index, (first, last) in enumerate(subject.bin_ranges):
        assert subject.bin_of(first) == subject.bin_of(last) == index
    assert subject.probabilities() == pytest.approx(np.array(sizes) / (span + 1))


def test_draws_follow_the_measured_loss():
    subject = sampler(min=1, max=40, bins=4, uniform_floor=0.2)
    subject.update([1.0, 2.0, 3.0, 24.0], [1, 1, 1, 4])  # means 1, 2, 3, 6
    expected = 0.2 * 0.25 + 0.8 * np.array([1, 2, 3, 6]) / 12
    assert subject.probabilities() == pytest.approx(expected)
    depths = np.array(subject.draw(step=5, count=20_000))
    counts = np.bincount((depths - 1) // 10, minlength=4)
    assert stats.chisquare(counts, 20_000 * expected).pvalue > 1e-4
    assert stats.chisquare(np.bincount(depths)[31:]).pvalue > 1e-4  # uniform within a bin


def test_running_mean_decays_and_unseen_bins_keep_theirs():
    subject = sampler(min=1, max=4, bins=2, uniform_floor=0.0, decay=0.75)
    subject.update([2.0, 2.0], [1, 1])
    subject.update([12.0, 99.0], [2, 0])
    assert subject.state_dict()["running_loss"] == pytest.approx([0.75 * 2 + 0.25 * 6, 2.0])


def test_uniform_where_everything_is_solved_or_the_schedule_says_so():
    solved = sampler(min=1, max=8, bins=2)
    solved.update([0.0, -1e-9], [3, 3])  # rounding below 0 counts as 0
    assert solved.probabilities() == pytest.approx([0.5, 0.5])
    uniform = sampler(min=1, max=8, bins=2, schedule="uniform")
    uniform.update([0.0, 5.0], [3, 3])
    assert uniform.probabilities() == pytest.approx([0.5, 0.5])


def test_draws_depend_on_seed_step_and_state_only():
    first, second = sampler(seed=1), sampler(seed=1)
    first.draw(step=0, count=100)  # a draw leaves no trace
    assert first.draw(step=7, count=50) == second.draw(step=7, count=50)
    assert first.draw(step=7, count=50) != first.draw(step=8, count=50)
    assert first.draw(step=7, count=50) != sampler(seed=2).draw(step=7, count=50)
    second.update(np.arange(8.0), np.ones(8))
    assert first.draw(step=7, count=50) != second.draw(step=7, count=50)
    assert first.draw(step=7, count=0) == []


def test_state_survives_json():
    saved = sampler(seed=4)
    saved.update(np.arange(8.0), [1, 1, 1, 1, 1, 1, 1, 0])
    resumed = sampler(seed=4)
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert resumed.draw(step=9, count=64) == saved.draw(step=9, count=64)
    for subject in (saved, resumed):
        subject.update(np.full(8, 0.1), np.ones(8))
    assert resumed.state_dict() == saved.state_dict()


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
HIDDEN_SIZES = st.sampled_from([None, 1, 8, 64, 4096])


@given(LENGTHS, HIDDEN_SIZES)
def test_sequences_neither_overlap_nor_leave_their_row(lengths: list[int], hidden_size: int | None) -> None:
    places, width = pack(lengths, hidden_size)
    taken: set[tuple[int, int]] = set()
    for (row, column), length in zip(places, lengths, strict=True):
        cells = {(row, column + offset) for offset in range(length)}
        assert not cells & taken
        taken |= cells
    assert {row for row, _ in taken} == set(range(1 + max(row for row, _ in taken)))
    assert max(column for _, column in taken) == width - 1 < 2 * max(lengths)


def test_rows_are_as_wide_as_pays() -> None:
    # Two rows of 11 tokens; as wide as the longest sequence only, 7 and 4 would not fit into one.
    assert pack([10, 7, 4], None)[1] == 10
    assert pack([10, 7, 4], 1000) == ([(0, 0), (1, 0), (1, 7)], 11)
    # Attention over 12 tokens costs as much as the rest of a layer at a hidden size of 2: still two rows, not one.
    assert pack([10, 10], 2) == ([(0, 0), (1, 0)], 10)


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40), st.integers(1, 8))
def test_dealing_keeps_every_item_and_balances_tokens(lengths: list[int], count: int) -> None:
    ordered = sorted(lengths, reverse=True)
    groups = deal(ordered, count)
    assert len(groups) == count
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    totals = [sum(group) for group in groups]
    assert max(totals) - min(totals) <= max(lengths)
