"""Steps whose loss or gradient is NaN or infinite: left out, counted, and kept for whoever looks for the cause.

DeepSpeed's ZeRO optimizers leave out a step by themselves when the norm of the gradients is not finite: gradients are
dropped, weights, moments and the learning rate's schedule stay. `engine.start_engine` teaches stage 0 the same, and
`spread_bad_loss` makes a bad loss of one rank show in the gradients of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raycomplete.losses.loss_types import TokenKind
from raycomplete.runtime.errors import NotFiniteError
from raycomplete.runtime.files import PRIVATE, write_json
from raycomplete.runtime.metrics_file import finite
from raycomplete.training.batches import MicroBatch


def spread_bad_loss(loss: Tensor) -> Tensor:
    """The loss, times NaN where it is not finite: its gradients, which are what is checked, then are not either."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


@dataclass(frozen=True, eq=False)
class _Seen:
    """One micro-batch; see `MicroBatch` for the shapes. `row_loss_N` is None in SFT."""

    input_ids_BT: Tensor
    row_N: Tensor
    kind_N: Tensor
    target_N: Tensor
    loss: Tensor
    row_loss_N: Tensor | None

    def record(self) -> dict[str, Any]:
        """Plain values from which the batch can be read again; a loss that is not finite is null."""
        length = self.input_ids_BT.shape[-1]
        count = self.row_N.numel()
        losses: list[Any] = [None] * count if self.row_loss_N is None else self.row_loss_N.float().tolist()
        columns = (self.row_N.tolist(), self.kind_N.tolist(), self.target_N.tolist(), losses)
        return {
            "loss": finite(float(self.loss)),
            "token_ids": self.input_ids_BT.tolist(),
            "rows": [
                {
                    "sequence": row // length,
                    "position": row % length,
                    "kind": TokenKind(kind).name.lower(),
                    "target_id": target,
                    "loss": finite(loss),
                }
                for row, kind, target, loss in zip(*columns, strict=True)
            ],
        }


class BadSteps:
    """Counts them, alike on every rank.

    Args:
        folder: Run folder.
        limit: As many in a row end training.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._batches: list[_Seen] = []
        self.total = 0
        self.in_a_row = 0

    def begin(self) -> None:
        """Forgets the batches of the step before."""
        self._batches.clear()

    def watch(self, batch: MicroBatch, loss: Tensor, row_loss_N: Tensor | None) -> None:
        """Remembers the tokens of a micro-batch of this step and their losses; its hidden states are let go."""
        rows = None if row_loss_N is None else row_loss_N.detach()
        self._batches.append(_Seen(batch.input_ids_BT, batch.row_N, batch.kind_N, batch.target_N, loss.detach(), rows))

    def count(self, step: int, *, skipped: bool) -> None:
        """Takes in whether the optimizer left out a step (counted from 0); every rank calls it with the same answer.

        Raises:
            NotFiniteError: It is the last one that is allowed in a row.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        path = self._folder / f"bad-step-{step + 1:06d}.json"
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [item.record() for item in self._batches])
        if dist.get_rank() == 0:
            write_json(path, {"step": step + 1, "ranks": ranks}, mode=PRIVATE)
        dist.barrier()
        if self.in_a_row >= self._limit:
            raise NotFiniteError(
                f"The loss or its gradient was NaN or infinite in {self.in_a_row} steps in a row, up to step "
                f"{step + 1}; none of them changed the weights. The last batch is in {path}.",
                "Look there for a sequence whose loss is null. If all are, lower train.lr or use bfloat16 and start "
                "anew; if the batches are at fault, resume with --resume and a higher train.max_bad_steps.",
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts, as plain JSON types."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes up a saved run."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
