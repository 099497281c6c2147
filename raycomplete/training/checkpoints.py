"""Training checkpoints: the room they need, who may have written them, saving and resuming.

They are DeepSpeed's own pickles, so only those that nobody else could write are loaded. A checkpoint counts only once
`complete.json` is in its folder, so that a kill or a full disk never leaves a half-written one to resume from.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from raycomplete.config import Dtype, TrainConfig
from raycomplete.runtime.errors import CheckpointError, RaycompleteError, SetupError, WorkError
from raycomplete.runtime.machine import as_gib, free_bytes, named_when_full
from raycomplete.storage import integrity

T = TypeVar("T")

TRUST_VARIABLE = "RAYCOMPLETE_TRUST_CHECKPOINTS"
_WEIGHTS = "weights.safetensors"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAX_HEADER_BYTES = 100 * 2**20  # as safetensors itself
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_bytes(num_parameters: int, dtype: Dtype, train: TrainConfig) -> int:
    """Size of one training checkpoint: weights, Adam's two float32 moments, float32 masters where DeepSpeed keeps them.

    LoRA adapters and their optimizer are small and not counted.
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
    """Number of parameters in a checkpoint's safetensors files, from their headers; a tied head counts once."""
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        # Loading it will say what is wrong with a damaged one.
        with path.open("rb") as stream, suppress(ValueError, TypeError, KeyError, AttributeError):
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
            total += sum(prod(item["shape"]) for name, item in header.items() if name != "__metadata__")
    return total


def check_space(folder: Path, student: Path, dtype: Dtype, train: TrainConfig) -> None:
    """Refuses a run whose checkpoints would fill the disk of its folder, which need not exist yet.

    The checkpoints that stay, one more (while the oldest is not dropped yet) and the student need room.
    """
    num_parameters = count_parameters(student)
    one = checkpoint_bytes(num_parameters, dtype, train)
    # Weights: of the student, and of the best step so far and the next while it is written.
    weights = num_parameters * _BYTES[dtype] * (3 if train.validation.interval(train.steps) else 1)
    there = len(integrity.complete_checkpoints(folder / "checkpoints"))
    stay = min(train.steps // train.checkpoint_every, train.keep_checkpoints)
    wanted = max(stay + 1 - there, 1)
    needed = wanted * one + weights
    free = free_bytes(folder)
    if free < needed:
        raise SetupError(
            f"Training needs about {as_gib(needed)} in {folder} ({wanted} checkpoints of {as_gib(one)}, and the "
            f"student) and {as_gib(free)} is free.",
            "Free some, lower train.keep_checkpoints, or choose another output.root.",
        )


def make_private(folder: Path) -> None:
    """Creates a folder that other users can neither change nor look into, or closes the one that is there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


def check_owned(folder: Path) -> None:
    """Refuses a folder of pickles that another user made or may have changed: loading a pickle runs what is in it."""
    if os.environ.get(TRUST_VARIABLE) == "1":
        return
    trusted = {os.geteuid(), 0}  # root can do anything anyway
    closed = stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0  # nobody else gets in, whatever the modes inside
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            problem, remedy = f"{path} is a link", "Copy what it points to into its place if you made it."
        elif status.st_uid not in trusted:
            problem = f"{path} belongs to user {status.st_uid} and this process to {os.geteuid()}"
            remedy = f"Resume as that user, or set {TRUST_VARIABLE}=1 where the storage only shows other owners."
        elif status.st_mode & _OTHERS_WRITE and not closed:
            problem = f"other users may write to {path} (mode {stat.S_IMODE(status.st_mode):04o})"
            remedy = f"If nobody did: chmod -R go-w {folder}"
        else:
            continue
        raise CheckpointError(f"Loading a training checkpoint can run code, and {problem}.", remedy)


def _dist() -> Any:
    """torch.distributed, imported late: the doctor reads sizes from this file before it knows that torch works."""
    import torch.distributed

    return torch.distributed


def from_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its result, or raises its error, on every rank; every rank must call this."""
    shared: list[Any] = [None, None]
    failure: Exception | None = None
    if _dist().get_rank() == 0:
        try:
            shared[0] = work()
        except Exception as error:  # broadcast to the other ranks first: they wait below
            failure = error
            shared[1] = error if isinstance(error, RaycompleteError) else WorkError(f"Rank 0 failed ({error}).")
    _dist().broadcast_object_list(shared, src=0)
    if failure or shared[1]:
        raise failure or shared[1]
    result: T = shared[0]
    return result


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], train: TrainConfig) -> None:
    """Writes a checkpoint after `step` finished steps, lets it count, and drops the oldest; every rank must call this.

    `state` holds plain values to restore (sampler, counters, rollouts). On a full disk the half-written checkpoint
    stays until `restore`, since other ranks may still be writing to it.
    """
    target = folder / f"step-{step:06d}"
    is_first = _dist().get_rank() == 0
    if is_first:
        make_private(folder)
        (target / integrity.COMPLETE).unlink(missing_ok=True)  # a resumed run may write a step again: not whole yet
    _dist().barrier()
    newest = integrity.complete_checkpoints(folder)[-1:]  # tells the size of the next
    size = sum(file.stat().st_size for path in newest for file in path.rglob("*") if file.is_file())
    with named_when_full(folder, f"the checkpoint of step {step}", size):
        engine.save_checkpoint(str(target), tag="state")
        _dist().barrier()  # the files of every rank are there
        if is_first:
            integrity.seal(target, {"step": step, "world_size": _dist().get_world_size(), **state})
    if is_first:
        integrity.prune(folder, train.keep_checkpoints)
    _dist().barrier()


def restore(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint into the engine, and returns its state; None where there is nothing to resume.

    Every rank must call this. A damaged newest checkpoint gives way to the one before.
    """

    def newest() -> Path | None:
        integrity.drop_unfinished(folder)
        return integrity.newest_whole(folder)

    # Rank 0 alone reads the files, and no two ranks continue from different steps.
    found = from_rank_zero(newest)
    if found is None:
        return None
    check_owned(folder)
    state: dict[str, Any] = json.loads((found / integrity.COMPLETE).read_text())
    world_size = _dist().get_world_size()
    if state["world_size"] != world_size:
        raise WorkError(
            f"The checkpoint {found.name} was made by {state['world_size']} workers, this run has {world_size}.",
            f"Resume with train.num_workers={state['world_size']}.",
        )
    loaded, _ = engine.load_checkpoint(str(found), tag="state")
    if loaded is None:
        problem = f"The checkpoint {found} cannot be loaded."
        raise WorkError(problem, "Remove its folder and resume from the one before.")
    return state


def save_weights(lm: Any, folder: Path, step: int, train: TrainConfig) -> None:
    """Writes the trained weights of a step, without the optimizer; every rank must call this."""
    from raycomplete.training.deepspeed_engine import gathered_state

    state = gathered_state(lm, train.zero_stage, trained_only=True)

    def write() -> None:
        from safetensors.torch import save_file

        target = folder / f"step-{step:06d}"
        make_private(folder)
        make_private(target)
        (target / integrity.COMPLETE).unlink(missing_ok=True)  # a resumed run may write a step again
        with named_when_full(folder, f"the weights of step {step}"):
            save_file(state or {}, target / _WEIGHTS)
            integrity.seal(target, {"step": step})

    from_rank_zero(write)


def restore_weights(lm: Any, folder: Path, step: int, train: TrainConfig) -> None:
    """Puts the weights that `save_weights` wrote back into the student; every rank must call this."""
    from raycomplete.training.deepspeed_engine import load_trained_state

    path = folder / f"step-{step:06d}"
    if damage := from_rank_zero(lambda: integrity.damage(path)):
        raise WorkError(f"The checkpoint {path} cannot be used: {damage}.", "Run again with --overwrite.")
    state: dict[str, Any] | None = None
    if _dist().get_rank() == 0:
        from safetensors.torch import load_file

        state = load_file(path / _WEIGHTS)
    load_trained_state(lm, train.zero_stage, state)


def keep_only(folder: Path, step: int) -> None:
    """Drops every checkpoint but that of one step; every rank must call this."""

    def drop() -> None:
        for path in folder.glob("step-*"):
            if path.name != f"step-{step:06d}":
                integrity.drop(path)

    from_rank_zero(drop)


def is_whole(folder: Path, step: int) -> bool:
    """True where the checkpoint of a step is there and undamaged; every rank must call this."""
    return from_rank_zero(lambda: integrity.damage(folder / f"step-{step:06d}") is None)
