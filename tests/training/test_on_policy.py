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
from raycomplete.methods.registry import DepthConfig, TeacherContext
from raycomplete.training import on_policy
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.on_policy import OnPolicySource, RolloutPlanner, compliance_by_bin
from raycomplete.training.rollout_engines import Rollout, RolloutBatch
from raycomplete.training.step_plan import Planner
from tests.training.tiny import completion, make_samples

DEPTH = DepthConfig(schedule="adaptive", min=1, max=8, bins=4)
SAMPLES = make_samples(0)


def planner(
    seed: int = 0, anchor_share: float = 0.5, trained: int = 8, student_prefix_fraction: float = 1.0
) -> RolloutPlanner:
    planner = Planner(SAMPLES, anchor_batch_size=8, recovery_batch_size=8, seed=seed)
    rollout = RolloutConfig(
        anchor_on_policy=anchor_share, student_prefix_fraction=student_prefix_fraction, max_refusal_tokens=4
    )
    return RolloutPlanner(planner, rollout, seed, trained)


def test_only_answers_to_harmless_prompts_are_continued_by_the_student() -> None:
    kinds = ("harmful", "benign", "borderline")
    anchor = tuple(replace(sample, kind=kinds[i % 3]) for i, sample in enumerate(SAMPLES.anchor))
    planner = Planner(replace(SAMPLES, anchor=anchor), anchor_batch_size=8, recovery_batch_size=8, seed=0)
    always = RolloutPlanner(planner, RolloutConfig(anchor_on_policy=1.0), 0, 8)
    rollout_batch = always.draw(0, DepthSampler(DEPTH, 0))
    assert {
        (sample.kind, cut is not None) for sample, cut in zip(rollout_batch.anchor, rollout_batch.cuts, strict=True)
    } == {
        ("harmful", False),
        ("benign", True),
        ("borderline", False),
    }


def answers(
    rollout_batch: RolloutBatch, *, refused: bool = False, tokens: tuple[int, ...] = (90, 91, 92, 93)
) -> list[Rollout]:
    count = len(rollout_batch.recovery)
    return [
        Rollout(tokens, (1,), refused and i < count, version=2, refusal_start=0 if refused else None)
        for i, _ in enumerate(rollout_batch.sequences())
    ]


def test_a_rollout_batch_is_a_function_of_seed_step_and_sampler_state() -> None:
    sampler = DepthSampler(DEPTH, 0)
    assert planner().draw(3, sampler) == planner().draw(3, sampler)
    assert planner().draw(3, sampler) != planner().draw(4, sampler)
    assert planner().seed_of(3) == planner().seed_of(3) != planner().seed_of(4)
    assert planner(seed=1).seed_of(3) != planner().seed_of(3)
    warmed = DepthSampler(DEPTH, 0)
    warmed.update([0, 0, 0, 9.0], [1, 1, 1, 1])
    assert planner().draw(3, warmed).depths != planner().draw(3, sampler).depths


def test_seeds_of_two_batches_never_overlap() -> None:
    seeds = sorted(planner().seed_of(step) for step in range(500))
    assert np.diff(seeds).min() >= 2**20
    assert seeds[-1] + 2**20 < 2**63


def test_the_student_reads_the_prompt_and_the_start_of_the_response() -> None:
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    sequences = rollout_batch.sequences()
    for sequence, sample, depth in zip(sequences, rollout_batch.recovery, rollout_batch.depths, strict=False):
        assert sequence == [*sample.prompt_ids, *sample.harmful_ids[:depth]]
        assert len(sequence) == len(sample.prompt_ids) + depth
    cut = [
        (sample, cut) for sample, cut in zip(rollout_batch.anchor, rollout_batch.cuts, strict=True) if cut is not None
    ]
    assert 0 < len(cut) < 8, "else this rollout batch shows only one of the two"
    for sequence, (sample, kept) in zip(sequences[8:], cut, strict=True):
        assert sequence == [*sample.prompt_ids, *sample.answer_ids[:kept]]
        assert kept < len(sample.answer_ids)


def test_a_refusal_of_the_student_is_distilled_at_its_own_depth() -> None:
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    plan = planner().finish(rollout_batch, answers(rollout_batch, refused=True, tokens=(90, 91)))
    for item, sample, depth in zip(plan.recovery, rollout_batch.recovery, rollout_batch.depths, strict=True):
        assert item.depth == depth
        assert item.sample == replace(sample, refusal_ids=(90, 91, 1))  # end-of-response is learned too
    longer = planner().finish(rollout_batch, answers(rollout_batch, refused=True))
    assert {item.sample.refusal_ids for item in longer.recovery} == {(90, 91, 92, 93)}, "at most max_refusal_tokens"


@pytest.mark.parametrize("start", [0, 3])
def test_the_opening_stays_that_of_aligned_where_the_student_refuses(start: int) -> None:
    """Within an answer the word that starts a refusal is another token than at its start."""
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    own = [replace(item, refusal_start=start) for item in answers(rollout_batch, refused=True)]
    method = Completion.model_validate({"weights": {"opening": 0.3}})
    for item, sample in zip(planner().finish(rollout_batch, own).recovery, rollout_batch.recovery, strict=True):
        (opening,) = (span for span in method.sequence(item).spans if span.term == "opening")
        assert item.sample.refusal_ids[0] == 90 + start
        assert opening.token_ids == sample.refusal_ids[:1]


def test_of_a_late_refusal_the_words_before_it_become_part_of_h() -> None:
    """The teacher reads r as the start of its own answer, so no word of compliance may stand in it."""
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    late = [replace(item, refusal_start=3) for item in answers(rollout_batch, refused=True)]
    for item, sample, depth in zip(
        planner().finish(rollout_batch, late).recovery, rollout_batch.recovery, rollout_batch.depths, strict=True
    ):
        assert item.sample.harmful_ids == (*sample.harmful_ids[:depth], 90, 91, 92)
        assert item.depth == depth + 3
        assert item.sample.refusal_ids == (93, 1)
        read = Completion().sequence(item).spans[-1].context
        assert read == TeacherContext(sample.teacher_prompt_ids, (93, 1))


def test_a_refusal_whose_start_is_unknown_is_answered_by_that_of_aligned() -> None:
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    unknown = [replace(item, refusal_start=None) for item in answers(rollout_batch, refused=True)]
    items = planner().finish(rollout_batch, unknown).recovery
    assert [(item.sample, item.depth) for item in items] == list(
        zip(rollout_batch.recovery, rollout_batch.depths, strict=True)
    )


def test_what_complies_and_refuses_in_the_end_is_cut_before_that() -> None:
    kept = set()
    for step in range(20):
        rollout_batch = planner().draw(step, DepthSampler(DEPTH, 0))
        ended = [replace(item, refusal_start=2) for item in answers(rollout_batch)]
        items = planner().finish(rollout_batch, ended).recovery
        kept |= {item.depth - depth for item, depth in zip(items, rollout_batch.depths, strict=True)}
    assert kept == {0, 1, 2}


def test_compliance_is_cut_anywhere_and_answered_by_the_refusal_of_aligned() -> None:
    kept = set()
    for step in range(20):
        rollout_batch = planner().draw(step, DepthSampler(DEPTH, 0))
        plan = planner().finish(rollout_batch, answers(rollout_batch))
        for item, sample, depth in zip(plan.recovery, rollout_batch.recovery, rollout_batch.depths, strict=True):
            added = item.depth - depth
            kept.add(added)
            assert item.sample.harmful_ids[: item.depth] == sample.harmful_ids[:depth] + (90, 91, 92, 93)[:added]
            assert item.sample.refusal_ids == sample.refusal_ids
            if not added:
                assert item.sample is sample, "the teachers have read all of it before, and need not again"
    assert kept == {0, 1, 2, 3, 4}, "without end-of-response, after which no refusal could stand"


@pytest.mark.parametrize(
    ("student_prefix_fraction", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.25, 0.55), (1.0, 0.6, 1.0)]
)
def test_the_student_prefix_fraction_is_what_was_asked(student_prefix_fraction: float, low: float, high: float) -> None:
    """With 4 tokens, a cut in the student's words keeps at least one of them 4 times in 5."""
    added = []
    for step in range(30):
        one = planner(student_prefix_fraction=student_prefix_fraction)
        rollout_batch = one.draw(step, DepthSampler(DEPTH, 0))
        items = one.finish(rollout_batch, answers(rollout_batch)).recovery
        added += [item.depth - depth for item, depth in zip(items, rollout_batch.depths, strict=True)]
    assert low <= np.mean([count > 0 for count in added]) <= high


def test_what_still_complies_is_trained_first() -> None:
    few = planner(trained=5)
    rollout_batch = few.draw(0, DepthSampler(DEPTH, 0))
    rollouts = answers(rollout_batch)
    for index in (0, 1, 4, 6, 7):
        rollouts[index] = replace(rollouts[index], refused=True, refusal_start=2 * (index == 6))  # the others at once
    trained = [item.sample.sample_id for item in few.finish(rollout_batch, rollouts).recovery]
    assert trained == [rollout_batch.recovery[index].sample_id for index in (2, 3, 5, 6, 0)], "then late refusals"


def test_cut_anchors_end_in_the_words_of_the_student() -> None:
    rollout_batch = planner().draw(0, DepthSampler(DEPTH, 0))
    plan = planner().finish(rollout_batch, answers(rollout_batch))
    for item, sample, cut in zip(plan.anchor, rollout_batch.anchor, rollout_batch.cuts, strict=True):
        expected = sample.answer_ids if cut is None else (*sample.answer_ids[:cut], 90, 91, 92, 93, 1)
        assert item.sample.answer_ids == expected
    assert len(plan.anchor) == 8


def test_an_empty_answer_leaves_something_to_train() -> None:
    always = planner(anchor_share=1.0)
    rollout_batch = replace(always.draw(0, DepthSampler(DEPTH, 0)), cuts=(0,) * 8)
    silent = [Rollout((), (), False, 0) for _ in rollout_batch.sequences()]
    plan = always.finish(rollout_batch, silent)
    assert all(item.sample.answer_ids for item in plan.anchor)
    assert [item.depth for item in plan.recovery] == list(rollout_batch.depths)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_own_answers_is_what_was_asked(share: float) -> None:
    rollout_batch = planner(anchor_share=share).draw(0, DepthSampler(DEPTH, 0))
    assert len(rollout_batch.sequences()) == 8 + int(8 * share)


def test_compliance_is_counted_by_the_depth_of_the_prefill() -> None:
    sampler = DepthSampler(DEPTH, 0)
    rollout_batch = replace(planner(anchor_share=0.0).draw(0, sampler), depths=(1, 2, 3, 4, 4, 8, 8, 8))
    rollouts = [Rollout((9,), (), refused, 0) for refused in (True, False, False, False, True, True, True, False)]
    assert compliance_by_bin(rollout_batch, rollouts, sampler) == ([1, 2, 0, 1], [2, 3, 0, 3])


def test_plainly_asked_prompts_of_a_group_count_at_no_depth() -> None:
    sampler = DepthSampler(DEPTH, 0)
    batch = RolloutBatch(0, (), (), SAMPLES.recovery[:3], (0, 0, 1))
    rollouts = [Rollout((9,), (), refused, 0) for refused in (True, True, False)]
    assert compliance_by_bin(batch, rollouts, sampler) == ([1, 0, 0, 0], [1, 0, 0, 0])


@pytest.mark.parametrize(("sync_every", "checkpoint_every", "stops"), [(1, 25, [1, 2, 3, 4, 5]), (3, 4, [3, 4])])
def test_a_run_stops_only_where_its_engines_get_new_weights(
    sync_every: int, checkpoint_every: int, stops: list[int]
) -> None:
    rollout = RolloutConfig(on_policy=True, sync_every=sync_every, max_staleness=sync_every)
    unused: Any = None
    job: Any = SimpleNamespace(
        rollout=rollout, train=TrainConfig(checkpoint_every=checkpoint_every), method=completion()
    )
    source = OnPolicySource(job, unused, unused, unused, 0, 1, unused)
    assert [step for step in range(1, 6) if source.can_stop(step)] == stops


@pytest.mark.parametrize(("use_gpu", "colocated"), [(True, True), (True, False), (False, False)])
def test_a_trainer_makes_room_on_a_shared_gpu_before_an_engine_wakes(
    use_gpu: bool, colocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = RolloutConfig(on_policy=True, lookahead=0, colocated=colocated)
    unused: Any = None
    job: Any = SimpleNamespace(rollout=rollout, train=TrainConfig(), method=completion(), use_gpu=use_gpu)
    source = OnPolicySource(job, unused, unused, unused, 0, 1, unused)
    done: list[str] = []

    def update(step: int) -> dict[str, Any]:
        done.append("update")
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("room"))
    monkeypatch.setattr(source, "_update_engines", update)
    with pytest.raises(InterruptedError):
        source.next(0)
    assert done == [*(["room"] if colocated else []), "update"]


class DyingEngines:
    """Engines of which one dies with sent weights in it while it rolls out a step."""

    def __init__(self, dies_at: int) -> None:
        self.dies_at, self.version = dies_at, -1
        self.submitted: list[tuple[int, int, tuple[int, ...]]] = []

    def submit(self, batch: RolloutBatch, seed: int) -> Any:
        self.submitted.append((batch.step, seed, batch.depths))
        return batch, self.version, [step for step, _, _ in self.submitted].count(batch.step)

    def collect(self, reference: Any) -> list[Rollout]:
        batch, version, times = reference
        if batch.step == self.dies_at and times == 1:
            raise WeightsLostError(f"The weights of version {version} are gone.")
        return [replace(item, version=version) for item in answers(batch)]


class Updates:
    """Stands for `WeightSync`."""

    def __init__(self, engines: DyingEngines) -> None:
        self.engines, self.is_sending = engines, True
        self.done: list[tuple[int, bool]] = []

    def __call__(self, version: int) -> dict[str, Any]:
        self.done.append((version, self.is_sending))
        self.engines.version = version
        return {"seconds": 1.0, "version": version}


def dying(dies_at: int, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> tuple[OnPolicySource, Updates]:
    monkeypatch.setattr(on_policy, "from_rank_zero", lambda work: work())
    rollout = RolloutConfig(on_policy=True, lookahead=lookahead)  # type: ignore[arg-type]
    engines = DyingEngines(dies_at)
    job: Any = SimpleNamespace(
        rollout=rollout, train=TrainConfig(steps=4), method=completion(), use_gpu=False, student_engines=engines
    )
    updates: Any = Updates(engines)
    ignore: Any = SimpleNamespace(
        warm=lambda *_: None, request=lambda *_: None, take=lambda _: SimpleNamespace(wait_s=0.0)
    )
    drawn = Planner(SAMPLES, anchor_batch_size=4, recovery_batch_size=8, seed=0)
    return OnPolicySource(job, drawn, ignore, DepthSampler(DEPTH, 0), 0, 1, updates), updates


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("dies_at", [0, 2])
def test_rollouts_whose_weights_died_with_an_engine_are_made_again_by_present_ones(
    dies_at: int, lookahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rollout may come from a version that nobody named, and none is missing."""
    source, updates = dying(dies_at, lookahead, monkeypatch)
    rows = [source.next(step).stats for step in range(4)]
    made = updates.engines.submitted
    first, second = (item for item in made if item[0] == dies_at)
    assert first == second, "the same sequences under the same seeds"
    assert len(made) == 5
    assert updates.done[-1][1] is False
    assert [(version, sent) for version, sent in updates.done if version < dies_at] == [
        (step, True) for step in range(dies_at)
    ]
    assert (dies_at, False) in updates.done
    assert [row["sync"]["version"] for row in rows] == [0, 1, 2, 3]
    assert [row["staleness"] for row in rows] == [0 if step in (0, dies_at) else lookahead for step in range(4)]


def test_a_checkpoint_leaves_out_rollouts_whose_weights_died(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = dying(1, 1, monkeypatch)
    source.next(0)
    assert source.state_dict() == {"rollouts": []}
    whole, _ = dying(9, 1, monkeypatch)
    whole.next(0)
    assert [item["step"] for item in whole.state_dict()["rollouts"]] == [1]
