"""The closed form and the simulation check each other."""

from __future__ import annotations

import random

import pytest

from raycomplete.plan.simulate import simulate
from raycomplete.plan.step import IN_TURN, Loop, pace


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
        shared=rng.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(150))
def test_without_jitter_both_give_the_same_step_and_waiting(seed: int) -> None:
    loop = random_loop(random.Random(seed))
    expected, found = pace(loop), simulate(loop, steps=360, warmup=60).pace  # whole periods of every sync_every
    assert found.step == pytest.approx(expected.step, rel=1e-9)
    assert found.waiting == pytest.approx(expected.waiting, abs=1e-9)


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


@pytest.mark.parametrize(("lookahead", "sync_every", "stalest"), [(0, 1, 0), (1, 1, 1), (0, 3, 2), (1, 3, 3)])
def test_rollouts_are_as_stale_as_the_run_file_allows_for(lookahead: int, sync_every: int, stalest: int) -> None:
    loop = Loop(1.0, {"aligned": 0.5}, rollout=0.7, sync=0.1, lookahead=lookahead, sync_every=sync_every)
    assert simulate(loop).staleness == stalest == lookahead + sync_every - 1


def test_jitter_is_seeded_and_costs_time_where_queues_are_full() -> None:
    loop = Loop(1.0, {"aligned": 1.0, "base": 1.0}, rollout=1.0, sync=0.0)
    first, again = simulate(loop, jitter=0.3, seed=1), simulate(loop, jitter=0.3, seed=1)
    assert first == again
    assert first.pace.step != simulate(loop, jitter=0.3, seed=2).pace.step
    assert first.pace.step > pace(loop).step * 1.05, "each step waits for its slowest part"


def test_many_replicas_wait_for_their_slowest() -> None:
    loop = Loop(0.1, {"aligned": 1.0})
    one, many = (simulate(loop, jitter=0.3, replicas={"aligned": count}).pace.step for count in (1, 16))
    assert one == pytest.approx(1.0, rel=0.05), "jitter keeps the mean"
    assert many > 1.3 * one
