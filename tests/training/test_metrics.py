"""Measurements of a step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raycomplete.losses.loss import LossOutput
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import TERMS
from raycomplete.training.batches import MicroBatch
from raycomplete.training.metrics import StepMeter
from raycomplete.training.step_plan import DepthSampler
from tests.training.tiny import FourBins

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
    return DepthSampler(FourBins(min=2, max=9), 0)  # bins 2-3, 4-5, 6-7, 8-9


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
