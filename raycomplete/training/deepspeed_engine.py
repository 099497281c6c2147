"""The DeepSpeed engine around the student: its settings and start, bad steps, and the student's weights gathered.

A bad step is one whose loss or gradient is NaN or infinite. DeepSpeed's ZeRO optimizers leave out such a step by
themselves: its gradients are dropped, and weights, moments and the schedule of the learning rate stay. `start_engine`
makes stage 0 do the same, `spread_bad_loss` makes a bad loss of one rank show in the gradients of all, and `BadSteps`
counts bad steps and keeps their batches for whoever looks for the cause.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed import zero
from torch import Tensor

from raycomplete.config import Dtype, TrainConfig
from raycomplete.runtime.errors import NotFiniteError
from raycomplete.runtime.files import PRIVATE, write_json
from raycomplete.runtime.metrics_file import finite
from raycomplete.training.batches import MicroBatch

_MAX_BAD_STEPS = 3  # in a row
_CPU_BUCKET = 2**25  # gradients that are reduced together; DeepSpeed's default is a buffer of 2 GB


def start_engine(
    module: torch.nn.Module, train: TrainConfig, dtype: Dtype, per_device_batch_size: int, accumulation: int
) -> Any:
    """Wraps the student; the process group of Ray Train is already there.

    bfloat16 weights keep float32 masters in the optimizer. One optimizer step has `accumulation` forward passes.
    """
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory collective with g++ for minutes, or crash without a compiler; gloo's
        # collectives are fast enough on one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = _settings(train, dtype, per_device_batch_size, accumulation)
    engine, _, _, schedule = deepspeed.initialize(
        model=module, model_parameters=parameters, config=settings, dist_init_required=False
    )
    if not engine.zero_optimization():
        engine.optimizer.register_step_pre_hook(_leave_out_if_not_finite)
    shards = engine.zero_optimization_partition_gradients() or hasattr(engine.optimizer, "reduce_gradients")
    if dist.get_world_size() == 1 and not shards:
        # It would copy every gradient twice, which is a tenth of a step on a CPU, and round those of bfloat16 weights.
        engine.enable_backward_allreduce = False
    # DeepSpeed's schedule starts before its first iteration, with a rate of 0, which would waste the first step. A
    # checkpoint restores the schedule's own count afterwards.
    schedule.step()
    return engine


def _settings(train: TrainConfig, dtype: Dtype, per_device_batch_size: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": per_device_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW everywhere: DeepSpeed's fused ones compile at first use. Its own fused one reads and writes
            # each tensor once, not once an operation: on a CPU a tenth of the time (0.1 s for 135 M weights).
            "params": {
                "lr": train.lr,
                "weight_decay": train.weight_decay,
                "betas": [0.9, 0.95],
                "torch_adam": True,
                "fused": True,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(train.steps, train.warmup_steps + 1),
                "warmup_num_steps": max(train.warmup_steps, 1),
                # The first step already learns. DeepSpeed warms up over two steps at least, so 0 must start at the top.
                "warmup_min_ratio": 1.0 / (train.warmup_steps + 1),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if not torch.cuda.is_available():
        settings["zero_optimization"] |= {"reduce_bucket_size": _CPU_BUCKET, "allgather_bucket_size": _CPU_BUCKET}
    if dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # At stage 0 DeepSpeed would step bf16 weights without a float32 master copy, and small updates would round to
        # nothing; stage 1 keeps the copy and is otherwise the same.
        settings["zero_optimization"]["stage"] = max(train.zero_stage, 1)
    return settings


def _leave_out_if_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Drops the gradients of a step where they are not finite, as ZeRO's optimizers do; the engine counts it."""
    parameters = [item for group in optimizer.param_groups for item in group["params"] if item.grad is not None]
    norm = torch.stack([parameter.grad.float().norm() for parameter in parameters]).norm()
    optimizer.overflow = not bool(norm.isfinite())  # type: ignore[attr-defined]  # the engine reads it after the step
    if optimizer.overflow:  # type: ignore[attr-defined]
        for parameter in parameters:
            parameter.grad = None  # torch's optimizers pass over such parameters


def spread_bad_loss(loss: Tensor) -> Tensor:
    """Multiplies a loss that is not finite by NaN, so that its gradients, which are what is checked, are not either."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


class BadSteps:
    """Counts bad steps, alike on every rank, and writes a file for each; three in a row end training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watched: list[tuple[MicroBatch, Tensor, Tensor]] = []
        self.total = 0
        self.in_a_row = 0

    def begin(self) -> None:
        """Forgets the batches of the step before."""
        self._watched.clear()

    def watch(self, batch: MicroBatch, loss: Tensor, row_loss_N: Tensor) -> None:
        """Keeps the tokens of a micro-batch of this step and their losses, without its hidden states."""
        light = replace(batch, aligned_hidden_PH=None, base_hidden_PH=None)
        self._watched.append((light, loss.detach(), row_loss_N.detach()))

    def count(self, step: int, *, skipped: bool) -> None:
        """Takes in whether the optimizer left out a step (counted from 0); every rank calls it with the same answer."""
        if not skipped:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        path = self._folder / f"bad-step-{step + 1:06d}.json"
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [_record(*watched) for watched in self._watched])
        if dist.get_rank() == 0:
            write_json(path, {"step": step + 1, "ranks": ranks}, mode=PRIVATE)
        dist.barrier()
        if self.in_a_row >= _MAX_BAD_STEPS:
            raise NotFiniteError(
                f"The loss or its gradient was NaN or infinite in {self.in_a_row} steps in a row, up to step "
                f"{step + 1}; none of them changed the weights. The last batch is in {path}.",
                "Look there for a sequence whose loss is null. If all are, lower train.lr or use bfloat16 and start "
                "anew; if the batches are at fault, leave their prompts out.",
            )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _record(batch: MicroBatch, loss: Tensor, row_loss_N: Tensor) -> dict[str, Any]:
    """Plain values from which a micro-batch can be read again; a loss that is not finite is null."""
    length = batch.input_ids_BT.shape[-1]
    of_rows = (batch.row_N, batch.sequence_N, batch.term_N, batch.token_N, row_loss_N.float())
    columns = (values_N.tolist() for values_N in of_rows)
    return {
        "loss": finite(float(loss)),
        "token_ids": batch.input_ids_BT.tolist(),
        "rows": [
            {
                "row": row // length,  # of the token ids, where packed sequences stand side by side
                "column": row % length,
                "sequence": sequence,
                "term": batch.terms[term],
                "target_id": token,
                "loss": finite(row_loss),
            }
            for row, sequence, term, token, row_loss in zip(*columns, strict=True)
        ],
    }


def gathered_adapters(lm: Any) -> dict[str, tuple[Tensor, Tensor, float]] | None:
    """LoRA adapters (A [rank, in], B [out, rank], scale) on rank 0, by the name of the weight they belong to.

    LoRA runs at ZeRO-2 or less, where every rank holds whole adapters; None on other ranks.
    """
    if dist.get_rank() != 0:
        return None
    return {
        f"{name}.weight": (
            module.lora_A["default"].weight.detach().to("cpu", copy=True),
            module.lora_B["default"].weight.detach().to("cpu", copy=True),
            float(module.scaling["default"]),
        )
        for name, module in lm.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


def load_trained_state(lm: Any, stage: int, state: dict[str, Tensor] | None) -> None:
    """Puts back trained weights that `gathered_state` gave on rank 0; every rank must call this, others with None.

    Only the weights are put back, not the optimizer's float32 copies: training does not go on from here.
    """
    for name, parameter in lm.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3):
            if state is not None:
                parameter.copy_(state[name])
            if stage < 3:
                dist.broadcast(parameter.data, src=0)


def gathered_state(lm: Any, stage: int, *, trained_only: bool = False, copied: bool = True) -> dict[str, Tensor] | None:
    """The student's whole weights on rank 0, on the CPU; None on other ranks. Every rank must call this.

    `trained_only` leaves out frozen weights, as those under LoRA adapters, and buffers. Without `copied`, weights that
    no other rank holds a part of are the parameters themselves, where they are.
    """
    state: dict[str, Tensor] = {}
    first = dist.get_rank() == 0
    for name, parameter in lm.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with zero.GatheredParameters([parameter], enabled=stage == 3):
            if first:
                whole = parameter.detach()
                state[name] = whole.to("cpu", copy=True) if copied or stage == 3 else whole
    if not first:
        return None
    if not trained_only:
        state |= {name: buffer.detach().cpu() for name, buffer in lm.named_buffers() if name in lm.state_dict()}
    return state
