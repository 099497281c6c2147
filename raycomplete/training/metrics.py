"""Measurements of a step, shared between ranks."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raycomplete.losses.loss_types import LossOutput, TokenKind
from raycomplete.training.batches import MicroBatch
from raycomplete.training.depth_sampler import DepthSampler


class StepMeter:
    """Sums over the micro-batches of a step on one rank, then over ranks.

    Attributes:
        depth_loss_sum: Sum of mean recovery losses of items, by depth bin; over all ranks after `share`.
        depth_count: Items by depth bin; over all ranks after `share`.
        stop: Whether training should end after this step; where one rank knows, all ranks do after `share`.
    """

    def __init__(self, sampler: DepthSampler) -> None:
        self._sampler = sampler
        self._sums = torch.zeros(4, dtype=torch.float64)  # total, anchor, recovery, penalty
        # base-favored mass, alignment KL, deficit and student mass over penalty rows, and their number
        self._penalty = torch.zeros(5, dtype=torch.float64)
        self.depth_loss_sum = np.zeros(sampler.num_bins)
        self.depth_count = np.zeros(sampler.num_bins)
        self.stop = False

    def add_total(self, loss: Tensor) -> None:
        """One micro-batch of SFT."""
        self._sums[0] += loss.detach().double().cpu()

    def add(self, batch: MicroBatch, output: LossOutput) -> None:
        """One micro-batch of the completion loss."""
        parts = (output.total, output.anchor, output.recovery, output.penalty)
        self._sums += torch.stack([part.detach().double() for part in parts]).cpu()
        rows = (
            output.base_favored_mass_P,
            output.alignment_kl_P,
            output.deficit_P,
            output.student_mass_P,
            torch.ones_like(output.deficit_P),
        )
        self._penalty += torch.stack([row.double().sum() for row in rows]).cpu()
        recovery_N = batch.kind_N == TokenKind.RECOVERY
        size = batch.depth_B.numel()
        zeros_B = torch.zeros(size, dtype=torch.float64, device=batch.kind_N.device)
        item_N = batch.item_N[recovery_N]
        loss_B = zeros_B.index_add(0, item_N, output.row_loss_N[recovery_N].double())
        count_B = zeros_B.index_add(0, item_N, torch.ones_like(item_N, dtype=torch.float64))
        for depth, loss, count in zip(batch.depth_B.tolist(), loss_B.tolist(), count_B.tolist(), strict=True):
            if count > 0:
                ranges = self._sampler.bin_ranges  # a student's own words may carry h beyond the deepest cut
                bin_index = self._sampler.bin_of(min(max(depth, ranges[0][0]), ranges[-1][1]))
                self.depth_loss_sum[bin_index] += loss / count
                self.depth_count[bin_index] += 1

    def share(self, device: torch.device, scale: float, anchor_factor: float = 1.0) -> dict[str, Any]:
        """Sums over ranks and returns the step's losses.

        Args:
            device: Of the collective.
            scale: That of `BatchBuilder`.
            anchor_factor: That of `Emphasis`; the anchor is reported without it, in nats a token.
        """
        depth = torch.from_numpy(np.concatenate([self.depth_loss_sum, self.depth_count]))
        stop = torch.tensor([float(self.stop)], dtype=torch.float64)
        shared = torch.cat([self._sums, self._penalty, depth, stop]).to(device)
        dist.all_reduce(shared)
        values = shared.cpu().numpy()
        self.stop = bool(values[-1] > 0)
        num_bins = self._sampler.num_bins
        self.depth_loss_sum, self.depth_count = values[9 : 9 + num_bins], values[9 + num_bins : -1]
        total, anchor, recovery, penalty = (values[:4] / scale).tolist()
        rows = max(values[8], 1.0)
        return {
            "loss": total,
            "anchor": anchor / anchor_factor,
            "recovery": recovery,
            "penalty": penalty,
            "base_favored_mass": float(values[4] / rows),
            "alignment_kl": float(values[5] / rows),
            "deficit": float(values[6] / rows),
            "student_mass": float(values[7] / rows),
            "depth_loss": [
                float(loss / count) if count else None
                for loss, count in zip(self.depth_loss_sum, self.depth_count, strict=True)
            ],
        }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that any rank has held so far, resident on a CPU, allocated on a GPU; every rank must call it."""
    if device.type == "cuda":
        held = float(torch.cuda.max_memory_allocated(device))
    else:
        held = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts kibibytes
    shared = torch.tensor(held / 2**30, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return round(float(shared), 3)
