"""Measurements of a step, shared between ranks."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raycomplete.losses.loss import LossOutput
from raycomplete.losses.settings import LossSettings
from raycomplete.losses.terms import active_terms
from raycomplete.training.batches import MicroBatch
from raycomplete.training.step_plan import DepthSampler


def describe_terms(loss: LossSettings) -> dict[str, dict[str, Any]]:
    """Label, description and metrics of each term, by name, for readers of metrics.jsonl."""
    return {
        name: {"label": item.term.label, "description": item.term.description, "metrics": dict(item.term.metrics)}
        for name, item in zip(loss.names, active_terms(loss), strict=True)
    }


class StepMeter:
    """Sums over the micro-batches of a step on one rank, then over ranks."""

    def __init__(self, loss: LossSettings, sampler: DepthSampler, depth_term: str | None) -> None:
        self._sampler = sampler
        self._losses = dict.fromkeys(("total", *loss.names), 0.0)
        self._metrics = {name: 0.0 for item in active_terms(loss) for name in item.term.metrics}
        self._rows = dict.fromkeys(self._metrics, 0.0)
        self._depth_number = loss.names.index(depth_term) if depth_term is not None else None
        self.depth_loss_sum = np.zeros(sampler.num_bins)
        self.depth_count = np.zeros(sampler.num_bins)
        self.stop = False

    def add(self, batch: MicroBatch, output: LossOutput) -> None:
        """Takes in one micro-batch."""
        losses = {"total": output.total.detach(), **output.losses}
        metrics = {name: values.double().sum() for name, values in output.metrics.items()}
        # One copy from the device; sums are kept in float64.
        values = torch.stack([value.double() for value in (*losses.values(), *metrics.values())]).tolist()
        for name, value in zip(losses, values[: len(losses)], strict=True):
            self._losses[name] += value
        for name, value in zip(metrics, values[len(losses) :], strict=True):
            self._metrics[name] += value
            self._rows[name] += output.metrics[name].numel()
        if self._depth_number is None:
            return
        counted_N = batch.term_N == self._depth_number
        zeros_S = torch.zeros(batch.depth_S.numel(), dtype=torch.float64, device=batch.term_N.device)
        sequence_N = batch.sequence_N[counted_N]
        loss_S = zeros_S.index_add(0, sequence_N, output.row_loss_N[counted_N].double())
        count_S = zeros_S.index_add(0, sequence_N, torch.ones_like(sequence_N, dtype=torch.float64))
        ranges = self._sampler.bin_ranges
        for depth, loss, count in zip(batch.depth_S.tolist(), loss_S.tolist(), count_S.tolist(), strict=True):
            if count > 0 and depth >= 0:  # a student's own words may carry h beyond the deepest cut
                bin_index = self._sampler.bin_of(min(max(depth, ranges[0][0]), ranges[-1][1]))
                self.depth_loss_sum[bin_index] += loss / count
                self.depth_count[bin_index] += 1

    def share(self, device: torch.device, scale: float, loss_weights: Mapping[str, float]) -> dict[str, Any]:
        """Sums over ranks, and returns the step's losses, without factors on their weights, and mean metrics.

        `scale` is that of `BatchBuilder`.
        """
        sums = [*self._losses.values(), *self._metrics.values(), *self._rows.values(), float(self.stop)]
        shared = torch.from_numpy(np.concatenate([self.depth_loss_sum, self.depth_count, sums])).to(device)
        dist.all_reduce(shared)
        bins = self._sampler.num_bins
        self.depth_loss_sum, self.depth_count, values = np.split(shared.cpu().numpy(), [bins, 2 * bins])
        found = iter(values.tolist())
        losses = {name: next(found) / scale for name in self._losses}
        metrics = {name: next(found) for name in self._metrics}
        means = {name: value / max(next(found), 1.0) for name, value in metrics.items()}
        self.stop = next(found) > 0
        row: dict[str, Any] = {"loss": losses.pop("total")}
        row |= {name: value / loss_weights.get(name, 1.0) for name, value in losses.items()} | means
        if self._depth_number is not None:
            pairs = zip(self.depth_loss_sum, self.depth_count, strict=True)
            row["depth_loss"] = [float(loss / count) if count else None for loss, count in pairs]
        return row


def release_freed_memory() -> None:
    """Hands memory that was freed back to the system: in a worker glibc keeps it (`trainer.KEEP_MEMORY`).

    Blocks of many sizes leave gaps that the next ones do not fit into, and a worker grows by them.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that any rank has held so far, resident on a CPU, allocated on a GPU; every rank must call it."""
    if device.type == "cuda":
        held = float(torch.cuda.max_memory_allocated(device))
    else:
        held = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts kibibytes
    shared = torch.tensor(held / 2**30, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return round(float(shared), 3)
