"""Room on the disk: asked for before training starts, and named when it runs out."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from raycomplete.config import Dtype, TrainConfig
from raycomplete.errors import DiskFullError, SetupError

# torch and safetensors pass on the words of the system, or say only that a write failed, and no error number.
_FULL_WORDS = ("No space left on device", "file write failed", "Disk quota exceeded", "unexpected pos")
_FULL = {errno.ENOSPC, errno.EDQUOT}
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
        with path.open("rb") as stream:
            try:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            except (ValueError, MemoryError, OverflowError):  # loading it will say what is wrong
                continue
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


@contextmanager
def named_when_full(folder: Path, what: str, needed: int = 0, unfinished: Path | None = None) -> Iterator[None]:
    """Turns a full disk into one sentence; other errors pass.

    Args:
        folder: Where the block writes.
        what: For the message: "the checkpoint of step 40".
        needed: Bytes that it takes, where known.
        unfinished: Folder that is half-written then, and removed, which also frees its room.

    Raises:
        DiskFullError: The disk, or a quota, is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = free_bytes(folder)
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        size = f" ({as_gib(needed)} needed, {as_gib(free)} free)" if needed else f" ({as_gib(free)} free)"
        raise DiskFullError(
            f"The disk is full: {what} could not be written to {folder}{size}.",
            "What was complete before is untouched. Free some space, then resume with --resume.",
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is about a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write where a folder is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def as_gib(size: int) -> str:
    """1610612736 -> "1.5 GiB"; small sizes in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
