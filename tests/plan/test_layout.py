"""The pace of a step, the devices that each role gets, and what is said where something does not fit."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from raycomplete.config import load_run_file
from raycomplete.plan.catalogue import find_hardware, preset
from raycomplete.plan.estimate import make_plan
from raycomplete.plan.layout import IN_TURN, WAITING_GOAL, Loop, choose_layout, loop_of, memory_of, pace
from raycomplete.plan.trainer import worker_memory
from raycomplete.plan.workload import Request
from raycomplete.runtime.errors import SetupError
from tests.plan.conftest import JOBS, a_request

ALL_14B = dict.fromkeys(("student", "aligned", "base"), preset("14B"))


def test_the_large_example_fits_and_uses_at_most_what_is_there() -> None:
    asked = a_request()
    plan = make_plan(asked)
    assert plan.layout.devices <= 64
    assert plan.layout.parallel == {"aligned": 2, "base": 2, "rollout": 1}, "two H100 hold a 70B engine"
    assert all(sum(parts.values()) <= asked.usable_bytes for parts in plan.memory.values())
    assert plan.cost == pytest.approx(plan.hours * 64 * asked.hardware.example_price)
    trained = 1000 * 256 * ((64 + 512) + (64 + (3 + 128) / 2 + 64))
    assert plan.cost_per_million_tokens == pytest.approx(plan.cost / trained * 1e6)


def test_no_single_move_of_devices_makes_the_step_shorter() -> None:
    asked = a_request()
    best = choose_layout(asked)
    step = pace(loop_of(asked, best)).step
    left = asked.devices - best.devices
    for role in best.replicas:
        if best.parallel[role] <= left:
            assert pace(loop_of(asked, best.with_engines(role))).step > step * 0.998
    for workers in (1, 2, 4, 8, 16, 32):
        other = replace(best, workers=workers)
        if other.devices <= asked.devices:
            assert pace(loop_of(asked, other)).step >= step * 0.998


def test_the_goal_keeps_waiting_small_and_one_engine_fewer_does_not() -> None:
    asked = a_request("rollout.on_policy=false", "train.num_workers=8")
    plan = make_plan(replace(asked, nodes=2))
    goal = plan.goal
    assert goal is not None
    assert pace(loop_of(plan.request, goal)).waiting <= WAITING_GOAL
    for role, count in goal.replicas.items():
        if count > 1:
            fewer = replace(goal, replicas={**goal.replicas, role: count - 1})
            assert pace(loop_of(plan.request, fewer)).waiting > WAITING_GOAL


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (a_request(nodes=1, devices_per_node=1), "aligned scorer does not fit.*--gpus-per-node 9"),
        (
            a_request("train.gradient_checkpointing=false", "train.per_device_batch_size=64", nodes=2),
            r"training worker does not fit.*fits: train.gradient_checkpointing=true\.",
        ),
        (
            a_request(
                "train.zero_stage=1", shapes=dict.fromkeys(("student", "aligned", "base"), preset("14B")), nodes=2
            ),
            r"training worker does not fit.*fits: train.zero_stage=2\.",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_a_change_that_fits(asked: Request, words: str) -> None:
    with pytest.raises(SetupError) as caught:
        choose_layout(asked)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert re.search(r"[\d.]+ GiB more than", str(caught.value))


def test_the_proposed_change_does_fit() -> None:
    assert choose_layout(a_request(nodes=1, devices_per_node=9)).devices <= 9
    asked = a_request("train.gradient_checkpointing=true", "train.per_device_batch_size=64", nodes=2)
    assert choose_layout(asked).workers >= 1


def test_zero_3_is_not_proposed_to_an_adversary_of_suffixes() -> None:
    adversary = ("method.suffix_adversary.steps=8", "rollout.prompt_augmentation.fraction=0.3")
    shapes = dict.fromkeys(("student", "aligned", "base"), preset("32B"))
    for extra, deepest in (((), "3"), (adversary, "2")):
        with pytest.raises(SetupError) as caught:
            choose_layout(a_request("train.zero_stage=2", *extra, shapes=shapes, nodes=2))
        assert set(re.findall(r"zero_stage=(\d)", str(caught.value))) == {deepest}, str(caught.value)


def test_one_small_device_is_shared_in_turns() -> None:
    config = load_run_file(JOBS / "organism.yaml")
    shapes = dict.fromkeys(("student", "aligned", "base"), preset("135m"))
    asked = Request(config, shapes, find_hardware("cpu"))
    layout = choose_layout(asked)
    assert layout.shared
    loop = loop_of(asked, layout)
    assert pace(loop).step == pytest.approx(loop.train + sum(loop.scoring.values()))
    assert sum(sum(parts.values()) for parts in memory_of(asked, layout).values()) <= asked.usable_bytes


def test_higher_stages_and_recomputation_need_less() -> None:
    totals = [
        sum(worker_memory(a_request(f"train.zero_stage={stage}", f"train.gradient_checkpointing={again}"), 16).values())
        for stage, again in ((1, "false"), (2, "false"), (2, "true"), (3, "true"))
    ]
    assert totals == sorted(totals, reverse=True)


def random_loop(rng: random.Random) -> Loop:
    on_policy = rng.random() < 0.7
    return Loop(
        train=rng.uniform(0.1, 3),
        scoring={"aligned": rng.uniform(0.1, 3), "base": rng.choice([0.0, rng.uniform(0.1, 3)])},
        rollout=rng.uniform(0.1, 3) if on_policy else None,
        sync=rng.uniform(0, 1),
        fetch=rng.uniform(0, 0.3),
        lookahead=rng.choice([0, 1]) if on_policy else rng.choice([1, 2, 3]),
        sync_every=rng.choice([1, 1, 2, 3, 5]) if on_policy else 1,
    )


def played(loop: Loop, steps: int, warmup: int) -> tuple[float, float]:
    """Seconds a step and the share of waiting, when every queue serves its jobs in order."""
    last = warmup + steps
    free = dict.fromkeys([*loop.scoring, "rollout"], 0.0)  # when each role's engines have done all that was asked
    asked: set[int] = set()
    rolled, scored = [0.0] * (last + 4), [0.0] * (last + 4)
    now, started, busy = 0.0, [], []

    def run(role: str, ready: float, seconds: float) -> float:
        free[role] = max(free[role], ready) + seconds
        return free[role]

    for step in range(last + 1):
        started.append(now)
        on_policy = loop.rollout is not None
        updates = on_policy and step % loop.sync_every == 0
        now = max(now, rolled[step])  # rollouts of this step, where they were asked for ahead
        if updates:
            now = run("rollout", now, loop.sync)
        for ahead in range(step, step + loop.lookahead + 1):
            if ahead not in asked:
                asked.add(ahead)
                rolled[ahead] = run("rollout", now, loop.rollout) if loop.rollout is not None else now
                scored[ahead] = max(run(role, rolled[ahead], seconds) for role, seconds in loop.scoring.items())
        now = max(now, scored[step]) + loop.fetch + loop.train
        busy.append(loop.train + (loop.sync if updates else 0.0))
    span = started[last] - started[warmup]
    return span / steps, 1 - sum(busy[warmup:last]) / span


@pytest.mark.parametrize("seed", range(150))
def test_the_closed_form_is_the_pace_of_the_played_loop(seed: int) -> None:
    loop = random_loop(random.Random(seed))
    step, waiting = played(loop, steps=360, warmup=60)  # whole periods of every sync_every
    assert pace(loop).step == pytest.approx(step, rel=1e-9)
    assert pace(loop).waiting == pytest.approx(waiting, abs=1e-9)


@pytest.mark.parametrize(
    ("loop", "step", "bottleneck"),
    [
        (Loop(2.0, {"aligned": 1.0, "base": 0.5}), 2.0, "trainer"),
        (Loop(1.0, {"aligned": 3.0, "base": 0.5}), 3.0, "aligned scorer"),
        (Loop(2.0, {"aligned": 1.0}, rollout=1.5, sync=0.5, lookahead=0), 5.0, IN_TURN),
        (Loop(2.0, {"aligned": 1.0}, rollout=1.5, sync=0.5), 2.5, "trainer"),
        (Loop(2.0, {"aligned": 1.5}, rollout=2.0, sync=0.5), 3.0, IN_TURN),
        (Loop(1.0, {"aligned": 0.1}, rollout=4.0, sync=0.5), 4.5, "rollout engines"),
        (Loop(1.0, {"aligned": 2.0, "base": 3.0}, rollout=4.0, shared=True), 10.0, "everything in turn"),
    ],
)
def test_the_longest_cycle_sets_the_pace_and_is_named(loop: Loop, step: float, bottleneck: str) -> None:
    assert pace(loop).step == pytest.approx(step)
    assert pace(loop).bottleneck == bottleneck
    updates = loop.sync / loop.sync_every
    assert pace(loop).waiting == pytest.approx(1 - (loop.train + updates) / step)
