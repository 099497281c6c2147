"""The DeepSpeed engine around the student: settings, start, checkpoints, gathered weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed import zero

from raycomplete.config import Dtype, TrainConfig
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.machine import named_when_full
from raycomplete.storage import integrity
from raycomplete.training.ownership import check_owned, make_private

_COMPLETE = integrity.COMPLETE
_CPU_BUCKET = 2**25  # gradients that are reduced together; DeepSpeed's default is a buffer of 2 GB


def deepspeed_settings(
    train: TrainConfig, dtype: Dtype, *, per_device_batch_size: int, accumulation: int, steps: int, lr: float
) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run.

    Args:
        train: Stage, weight decay, clipping, warm-up.
        dtype: Of the weights; bfloat16 keeps float32 master weights in the optimizer.
        per_device_batch_size: Sequences of one forward pass on one worker.
        accumulation: Forward passes of one optimizer step.
        steps: Length of the learning-rate schedule.
        lr: Peak learning rate.
    """
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
                "lr": lr,
                "weight_decay": train.weight_decay,
                "betas": [0.9, 0.95],
                "torch_adam": True,
                "fused": True,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(steps, train.warmup_steps + 1),
                "warmup_num_steps": max(train.warmup_steps, 1),
                "warmup_min_ratio": 1.0 / (max(train.warmup_steps, 1) + 1),  # the first step already learns
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


def start_engine(module: torch.nn.Module, settings: dict[str, Any]) -> Any:
    """Wraps the student; the process group of Ray Train is already there."""
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory collective with g++ for minutes, or crash without a compiler; gloo's
        # collectives are fast enough on one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, schedule = deepspeed.initialize(
        model=module, model_parameters=parameters, config=settings, dist_init_required=False
    )
    if not engine.zero_optimization():
        engine.optimizer.register_step_pre_hook(_leave_out_if_not_finite)
    # DeepSpeed's schedule starts before its first iteration, with a rate of 0, which would waste the first step. A
    # checkpoint restores the schedule's own count afterwards.
    schedule.step()
    return engine


def _leave_out_if_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What ZeRO's optimizers do by themselves: a step whose gradients are not finite changes nothing and is counted."""
    parameters = [item for group in optimizer.param_groups for item in group["params"] if item.grad is not None]
    norm = torch.stack([parameter.grad.float().norm() for parameter in parameters]).norm()
    optimizer.overflow = not bool(norm.isfinite())  # type: ignore[attr-defined]  # the engine reads it after the step
    if optimizer.overflow:  # type: ignore[attr-defined]
        for parameter in parameters:
            parameter.grad = None  # torch's optimizers pass over such parameters


def save(
    engine: Any, folder: Path, step: int, state: dict[str, Any], keep: int | None, train: TrainConfig | None = None
) -> None:
    """Writes a checkpoint that counts only once `complete.json` stands in it, then drops the oldest.

    Args:
        engine: DeepSpeed engine; every rank must call this.
        folder: The run's `checkpoints/`.
        step: Finished steps.
        state: Plain values to restore (sampler, counters, rollouts); readable by the owner only.
        keep: Complete checkpoints to keep; None keeps all.
        train: Says what else is kept and whether files are hashed; its defaults when absent.

    Raises:
        DiskFullError: There was no room. The half-written checkpoint stays until `drop_unfinished`, since other ranks
            may still be writing to it.
    """
    train = train or TrainConfig()
    target = folder / f"step-{step:06d}"
    if dist.get_rank() == 0:
        make_private(folder)
        (target / _COMPLETE).unlink(missing_ok=True)  # a resumed run may write a step again: until then it is not whole
    dist.barrier()
    with named_when_full(folder, f"the checkpoint of step {step}", _newest_size(folder)):
        engine.save_checkpoint(str(target), tag="state")
        dist.barrier()  # the files of every rank are there
        if dist.get_rank() == 0:
            content = {"step": step, "world_size": dist.get_world_size(), **state}
            integrity.seal(target, content, hashed=train.checkpoint_hashes)
    if dist.get_rank() == 0:
        integrity.prune(folder, keep, train.keep_every)
    dist.barrier()


def keep_only(folder: Path, *steps: int) -> None:
    """Drops every checkpoint but those of some steps; every rank must call this."""
    if dist.get_rank() == 0:
        kept = {f"step-{step:06d}" for step in steps}
        for path in folder.glob("step-*"):
            if path.name not in kept:
                integrity.drop(path)
    dist.barrier()


def drop_unfinished(folder: Path) -> None:
    """`integrity.drop_unfinished`; every rank must call this."""
    if dist.get_rank() == 0:
        integrity.drop_unfinished(folder)
    dist.barrier()


def _newest_size(folder: Path) -> int:
    """Bytes of the newest complete checkpoint; 0 where there is none to tell the size of the next."""
    newest = integrity.complete_checkpoints(folder)[-1:]
    return sum(file.stat().st_size for path in newest for file in path.rglob("*") if file.is_file())


def restore(engine: Any, folder: Path, step: int | None = None, *, hashed: bool = True) -> dict[str, Any] | None:
    """Loads a checkpoint into the engine, whole ones only: a damaged newest one gives way to the one before.

    Args:
        engine: DeepSpeed engine; every rank must call this.
        folder: Where checkpoints are.
        step: Which one; the newest when absent.
        hashed: False compares sizes only.

    Returns:
        The saved state with its "step", or None where there is nothing to resume.

    Raises:
        CheckpointError: Another user may have written what is there.
        WorkError: The checkpoint of `step` is gone, none is whole, it was made with another number of workers, or it
            cannot be read.
    """
    found = _agreed(lambda: _whole(folder, step, hashed))
    if found is None:
        return None
    check_owned(folder)
    state: dict[str, Any] = json.loads((found / _COMPLETE).read_text())
    if state["world_size"] != dist.get_world_size():
        raise WorkError(
            f"The checkpoint {found.name} was made by {state['world_size']} workers, this run has "
            f"{dist.get_world_size()}.",
            f"Resume with train.num_workers={state['world_size']}.",
        )
    loaded, _ = engine.load_checkpoint(str(found), tag="state")
    if loaded is None:
        raise WorkError(
            f"The checkpoint {found} cannot be loaded.", "Remove its folder and resume from the one before."
        )
    return state


def is_whole(folder: Path, step: int, *, hashed: bool = True) -> bool:
    """Whether the checkpoint of a step is there and undamaged; every rank must call this."""
    path = folder / f"step-{step:06d}"
    return bool(_agreed(lambda: integrity.damage(path, hashed=hashed) is None))


def _whole(folder: Path, step: int | None, hashed: bool) -> Path | None:
    if step is None:
        return integrity.newest_whole(folder, hashed=hashed)
    path = folder / f"step-{step:06d}"
    damage = integrity.damage(path, hashed=hashed)
    if damage is not None:
        raise WorkError(f"The checkpoint {path} cannot be used: {damage}.", "Run again with --overwrite.")
    return path


def _agreed(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank: the files are read once, and no two ranks go on from different steps."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except WorkError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gathered_adapters(lm: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]] | None:
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


def gathered_state(engine: Any, lm: Any, stage: int) -> dict[str, torch.Tensor] | None:
    """The student's whole weights on rank 0, on the CPU; None on other ranks. Every rank must call this."""
    state: dict[str, torch.Tensor] = {}
    first = dist.get_rank() == 0
    for name, parameter in lm.named_parameters():
        with zero.GatheredParameters([parameter], enabled=stage == 3):
            if first:
                state[name] = parameter.detach().to("cpu", copy=True)
    if not first:
        return None
    state |= {name: buffer.detach().cpu() for name, buffer in lm.named_buffers() if name in lm.state_dict()}
    return state
