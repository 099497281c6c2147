"""Measurements of a step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.config import DepthConfig
from raycomplete.losses.loss_types import LossOutput, TokenKind
from raycomplete.training.batches import MicroBatch
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.metrics import StepMeter, peak_memory_gib

A, R, P = (int(kind) for kind in (TokenKind.ANCHOR, TokenKind.RECOVERY, TokenKind.PENALTY))
CPU = torch.device("cpu")


@pytest.fixture
def sampler() -> DepthSampler:
    return DepthSampler(DepthConfig(min=2, max=9, bins=4), 0)  # bins 2-3, 4-5, 6-7, 8-9


def per_device_batch_size(kind_N: list[int], item_N: list[int], depth_B: list[int]) -> MicroBatch:
    nothing = torch.empty(0)
    return MicroBatch(
        input_ids_BT=nothing,
        position_ids_BT=nothing,
        row_N=nothing,
        kind_N=torch.tensor(kind_N),
        weight_N=nothing,
        item_N=torch.tensor(item_N),
        aligned_hidden_NH=None,
        base_hidden_PH=None,
        depth_B=torch.tensor(depth_B),
        target_N=nothing,
        num_tokens=0,
    )


def output(row_loss_N: list[float], parts: tuple[float, ...], penalty_rows: list[list[float]]) -> LossOutput:
    total, anchor, recovery, penalty = (torch.tensor(part) for part in parts)
    mass_P, depth_P, deficit_P, student_mass_P = torch.tensor(penalty_rows).T
    return LossOutput(
        total, anchor, recovery, penalty, torch.tensor(row_loss_N), mass_P, depth_P, deficit_P, student_mass_P
    )


def fill(meter: StepMeter) -> None:
    """Two micro-batches: an anchor item, then recovery items at depths 3, 9 and 1 (shorter than the first bin)."""
    meter.add(
        per_device_batch_size([A, A, P, R, R, R], [0, 0, 1, 1, 1, 1], [-1, 3]),
        output([5, 5, 7, 1, 2, 3], (4.0, 3.0, 2.0, 1.0), [[0.1, 0.2, 0.3, 0.4]]),
    )
    meter.add(
        per_device_batch_size([R, P, P, R, R], [0, 1, 1, 1, 1], [1, 9]),
        output([4, 7, 7, 8, 9], (8.0, 1.0, 6.0, 5.0), [[0.3, 0.4, 0.5, 0.6], [0.5, 0.6, 0.7, 0.8]]),
    )


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
    meter = StepMeter(sampler)
    fill(meter)
    row = meter.share(CPU, scale=2.0 * world_size)
    # Losses are means over micro-batches and ranks; what penalty rows show is a mean over these rows.
    assert {name: row[name] for name in ("loss", "anchor", "recovery", "penalty")} == pytest.approx(
        {"loss": 6.0, "anchor": 2.0, "recovery": 4.0, "penalty": 3.0}
    )
    seen = {name: row[name] for name in ("base_favored_mass", "alignment_kl", "deficit", "student_mass")}
    assert seen == pytest.approx(
        {"base_favored_mass": 0.3, "alignment_kl": 0.4, "deficit": 0.5, "student_mass": 0.6}, abs=1e-6
    )
    # By depth: a mean over items of each item's mean recovery loss; anchor and penalty rows do not count.
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
    meter = StepMeter(sampler)
    meter.share(CPU, scale=1.0)
    assert meter.stop is asked


def test_sft_counts_its_loss_alone(sampler: DepthSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared: None)
    meter = StepMeter(sampler)
    for loss in (1.0, 3.0):
        meter.add_total(torch.tensor(loss, requires_grad=True))
    row = meter.share(CPU, scale=2.0)
    assert row["loss"] == 2.0
    assert row["recovery"] == row["base_favored_mass"] == 0.0
    assert row["depth_loss"] == [None] * 4
