"""Which devices each role gets, and what is said where something does not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.plan.estimate import make_plan
from raycomplete.plan.hardware import find_hardware
from raycomplete.plan.layout import WAITING_GOAL, choose_layout
from raycomplete.plan.memory import usable
from raycomplete.plan.request import Request, loop_of, memories, worker_memory
from raycomplete.plan.shapes import preset
from raycomplete.plan.step import pace
from raycomplete.runtime.errors import SetupError

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def request(*overrides: str, **changes: Any) -> Request:
    config = load_run_file(JOBS / "plan-70b.yaml", overrides)
    shapes = {"student": preset("8B"), "aligned": preset("70B"), "base": preset("70B")}
    return replace(Request(config, shapes, find_hardware("h100"), nodes=8, devices_per_node=8), **changes)


def test_the_large_example_fits_and_uses_at_most_what_is_there() -> None:
    asked = request()
    plan = make_plan(asked)
    assert plan.layout.devices <= 64
    assert plan.layout.parallel == {"aligned": 2, "base": 2, "rollout": 1}, "two H100 hold a 70B engine"
    assert all(item.total <= usable(asked.hardware) for item in plan.memory)
    assert plan.simulated.pace.step == pytest.approx(plan.pace.step, rel=1e-9)
    assert plan.cost == pytest.approx(plan.hours * 64 * asked.hardware.example_price)
    trained = 1000 * 256 * ((64 + 512) + (64 + (3 + 128) / 2 + 64))
    assert plan.cost_per_million_tokens == pytest.approx(plan.cost / trained * 1e6)


def test_no_single_move_of_devices_makes_the_step_shorter() -> None:
    asked = request()
    best = choose_layout(asked)
    step = pace(loop_of(asked, best)).step
    left = asked.devices - best.devices
    for role in best.replicas:
        if best.parallel[role] <= left:
            assert pace(loop_of(asked, best.with_one_more(role))).step > step * 0.998
    for workers in (1, 2, 4, 8, 16, 32):
        other = replace(best, workers=workers)
        if other.devices <= asked.devices:
            assert pace(loop_of(asked, other)).step >= step * 0.998


def test_the_goal_keeps_waiting_small_and_one_engine_fewer_does_not() -> None:
    asked = request("rollout.on_policy=false", "train.num_workers=8")
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
        (request(nodes=1, devices_per_node=1), "aligned scorer does not fit.*--gpus-per-node 9"),
        (
            request("train.gradient_checkpointing=false", "train.per_device_batch_size=64", nodes=2),
            r"training worker does not fit.*fits: train.gradient_checkpointing=true\.",
        ),
        (
            request("train.zero_stage=1", shapes=dict.fromkeys(("student", "aligned", "base"), preset("14B")), nodes=2),
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
    assert choose_layout(request(nodes=1, devices_per_node=9)).devices <= 9
    asked = request("train.gradient_checkpointing=true", "train.per_device_batch_size=64", nodes=2)
    assert choose_layout(asked).workers >= 1


def test_one_small_device_is_shared_in_turns() -> None:
    config = load_run_file(JOBS / "organism.yaml")
    shapes = dict.fromkeys(("student", "aligned", "base"), preset("135m"))
    asked = Request(config, shapes, find_hardware("cpu", measured=Path("/nonexistent")))
    layout = choose_layout(asked)
    assert layout.shared
    loop = loop_of(asked, layout)
    assert pace(loop).step == pytest.approx(loop.train + sum(loop.scoring.values()))
    assert sum(item.total for item in memories(asked, layout)) <= usable(asked.hardware)


def test_higher_stages_and_recomputation_need_less() -> None:
    totals = [
        worker_memory(request(f"train.zero_stage={stage}", f"train.gradient_checkpointing={again}"), 16).total
        for stage, again in ((1, "false"), (2, "false"), (2, "true"), (3, "true"))
    ]
    assert totals == sorted(totals, reverse=True)
