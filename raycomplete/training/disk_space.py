"""Room for checkpoints, asked for before training starts."""

from __future__ import annotations

import json
from contextlib import suppress
from math import prod
from pathlib import Path

from raycomplete.config import Dtype, TrainConfig
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.machine import as_gib, free_bytes

_MAX_HEADER_BYTES = 100 * 2**20  # as safetensors itself
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_bytes(num_parameters: int, dtype: Dtype, train: TrainConfig) -> int:
    """Size of one training checkpoint: weights, Adam's two float32 moments, float32 masters where DeepSpeed keeps them.

    Args:
        num_parameters: Of the student.
        dtype: Of its weights.
        train: ZeRO stage and LoRA; adapters and their optimizer are small and not counted.
    """
    weights = num_parameters * _BYTES[dtype]
    if train.lora_rank > 0:
        return weights
    if train.zero_stage == 0 and dtype == "float32":
        return weights + 8 * num_parameters
    if train.zero_stage == 3:  # weights travel as their float32 masters only
        return 12 * num_parameters
    return weights + 12 * num_parameters


def count_parameters(checkpoint: Path) -> int:
    """Numbers in a checkpoint's safetensors files, from their headers; a tied head counts once."""
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        # Loading it will say what is wrong with a damaged one.
        with path.open("rb") as stream, suppress(ValueError, TypeError, KeyError, AttributeError):
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
            total += sum(prod(item["shape"]) for name, item in header.items() if name != "__metadata__")
    return total


def check_space(folder: Path, student: Path, dtype: Dtype, train: TrainConfig) -> None:
    """Refuses a run whose checkpoints would fill the disk.

    Args:
        folder: The run folder, which need not exist yet.
        student: Checkpoint that the student starts from.
        dtype: Of its weights.
        train: How many checkpoints are kept; one more exists while the oldest is not dropped yet.

    Raises:
        SetupError: Less is free than `train.keep_checkpoints` + 1 checkpoints and the student take.
    """
    num_parameters = count_parameters(student)
    one = checkpoint_bytes(num_parameters, dtype, train)
    best = 2 if train.validation.every > 0 else 0  # the best one so far, and the next while it is written
    there = len(list((folder / "checkpoints").glob("step-*/complete.json")))
    wanted = max(train.keep_checkpoints + 1 - there, 1) + best
    needed = wanted * one + num_parameters * _BYTES[dtype]
    free = free_bytes(folder)
    if free < needed:
        raise SetupError(
            f"Training needs about {as_gib(needed)} in {folder} ({wanted} checkpoints of {as_gib(one)}, and the "
            f"student) and {as_gib(free)} is free.",
            "Free some, lower train.keep_checkpoints, or choose another output.root.",
        )
