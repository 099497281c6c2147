"""Measurements of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.losses.loss import LossOutput
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import TERMS
from raycomplete.methods.registry import DepthConfig
from raycomplete.training.batches import MicroBatch
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.metrics import StepMeter, describe_terms, peak_memory_gib
from raycomplete.training.trainer import KEEP_MEMORY

A, R, P = range(3)
LOSS = LossSettings(weights={"anchor": 1.0, "recovery": 1.0, "push_forward": 0.1})
METRICS = ("one", "other")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_term_with_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    term = replace(TERMS["push_forward"], metrics={name: f"{name} of two" for name in METRICS})
    monkeypatch.setitem(TERMS, "push_forward", term)


@pytest.fixture
def sampler() -> DepthSampler:
    return DepthSampler(DepthConfig(min=2, max=9, bins=4), 0)  # bins 2-3, 4-5, 6-7, 8-9


def micro_batch(term_N: list[int], sequence_N: list[int], depth_S: list[int]) -> MicroBatch:
    nothing = torch.empty(0)
    return MicroBatch(
        input_ids_BT=nothing,
        position_ids_BT=nothing,
        row_N=nothing,
        term_N=torch.tensor(term_N),
        weight_N=nothing,
        sequence_N=torch.tensor(sequence_N),
        token_N=nothing,
        aligned_hidden_PH=None,
        base_hidden_PH=None,
        depth_S=torch.tensor(depth_S),
        terms=LOSS.names,
        suffix_S3=nothing,
        num_tokens=0,
    )


def output(row_loss_N: list[float], parts: tuple[float, ...], push_forward_rows: list[list[float]]) -> LossOutput:
    total, *losses = (torch.tensor(part) for part in parts)
    metrics = dict(zip(METRICS, torch.tensor(push_forward_rows).T, strict=True))
    return LossOutput(total, dict(zip(LOSS.names, losses, strict=True)), torch.tensor(row_loss_N), metrics)


def fill(meter: StepMeter) -> None:
    """An anchor item, recovery items at depths 3, 9 and 1 (shorter than the first bin), and one that follows no h."""
    meter.add(
        micro_batch([A, A, P, R, R, R], [0, 0, 1, 1, 1, 1], [-1, 3]),
        output([5, 5, 7, 1, 2, 3], (4.0, 3.0, 2.0, 1.0), [[0.1, 0.2]]),
    )
    meter.add(
        micro_batch([R, P, P, R, R, R], [0, 1, 1, 1, 1, 2], [1, 9, -1]),
        output([4, 7, 7, 8, 9, 50], (8.0, 1.0, 6.0, 5.0), [[0.3, 0.4], [0.5, 0.6]]),
    )


FREED = """
import numpy as np
from raycomplete.training.metrics import release_freed_memory

def resident() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

blocks = [np.ones(2**22 // 8) for _ in range(64)]  # 4 MiB each
pin = np.ones(2**20)
del blocks
kept = resident()
release_freed_memory()
print(kept - resident())
"""


def test_a_worker_hands_back_what_it_freed() -> None:
    """`KEEP_MEMORY` keeps it, even behind a block that is still in use."""
    found = subprocess.run(
        [sys.executable, "-c", FREED], env={**os.environ, **KEEP_MEMORY}, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) > 200


def test_peak_memory_is_that_of_the_worst_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared, op: asked.append((shared.clone(), op)))
    ballast = torch.ones(64 * 2**20)  # 256 MiB, each page touched
    before = peak_memory_gib(CPU)
    assert before > ballast.nbytes / 2**30, "in GiB, and this process holds more than its largest tensor"
    del ballast
    assert peak_memory_gib(CPU) >= before, "a peak is not forgotten"
    assert [op for _, op in asked] == [torch.distributed.ReduceOp.MAX] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_sums_over_micro_batches_and_ranks(
    world_size: int, sampler: DepthSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(shared: Tensor) -> None:
        shared.mul_(world_size)  # ranks that measured the same

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    meter = StepMeter(LOSS, sampler, "recovery")
    fill(meter)
    row = meter.share(CPU, scale=2.0 * world_size, loss_weights={"anchor": 4.0})
    # Losses are means over micro-batches and ranks; the factor on a weight is left out; metrics of the
    # push-forward are means over its rows.
    assert {name: row[name] for name in ("loss", "anchor", "recovery", "push_forward")} == pytest.approx(
        {"loss": 6.0, "anchor": 0.5, "recovery": 4.0, "push_forward": 3.0}
    )
    assert [row[name] for name in METRICS] == pytest.approx([0.3, 0.4], abs=1e-6)
    # By depth: a mean over items of each item's mean recovery loss; anchor and push-forward rows do not count.
    assert row["depth_loss"] == [pytest.approx(3.0), None, None, pytest.approx(8.5)]
    assert meter.depth_loss_sum.tolist() == pytest.approx([6.0 * world_size, 0, 0, 8.5 * world_size])
    assert meter.depth_count.tolist() == [2 * world_size, 0, 0, world_size]
    sampler.update(meter.depth_loss_sum, meter.depth_count)
    assert sampler.state_dict()["running_loss"] == [pytest.approx(3.0), None, None, pytest.approx(8.5)]
    json.dumps(row)


@pytest.mark.parametrize("asked", [False, True])
def test_every_rank_learns_that_one_was_asked_to_stop(
    asked: bool, sampler: DepthSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(shared: Tensor) -> None:
        shared[-1] += asked  # of another rank

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    meter = StepMeter(LOSS, sampler, "recovery")
    meter.share(CPU, scale=1.0, loss_weights={})
    assert meter.stop is asked


def test_a_loss_without_metrics_and_depths_counts_itself_alone(
    sampler: DepthSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared: None)
    meter = StepMeter(LossSettings(weights={"nll": 1.0}), sampler, None)
    for loss in (1.0, 3.0):
        total = torch.tensor(loss, requires_grad=True)
        meter.add(micro_batch([0], [0], [-1]), LossOutput(total, {"nll": total.detach()}, torch.tensor([loss])))
    assert meter.share(CPU, scale=2.0, loss_weights={}) == {"loss": 2.0, "nll": 2.0}


def test_terms_are_described_for_readers_of_the_metrics() -> None:
    found = describe_terms(LOSS)
    assert list(found) == ["anchor", "recovery", "push_forward"]
    assert tuple(found["push_forward"]["metrics"]) == METRICS
    assert all(about["label"] and about["description"] for about in found.values())
