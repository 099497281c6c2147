"""Versioned weights: packed into Ray's object store by the trainer and loaded by engines, or sent to them.

Every call to an engine names the weights that it needs. The object store brings `Weights` to any node, and an engine
that was restarted finds them there as before. `SentWeights` are in the engines that received them and nowhere else
(`raycomplete.engines.weight_transfer`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import ray
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raycomplete.data.checkpoints import tensor_files
from raycomplete.data.families import is_head_tensor, is_optional_tensor
from raycomplete.engines.score_cache import to_array, view_tensor
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.ray_calls import wait_for

_CHUNK_BYTES = 512 * 2**20  # an object much larger than this may not fit between others in a store that is half full
_MEMORY = "/dev/shm"
_PREFIX, _CLAIM = "raycomplete-weights-", "claim"
_HEADER_BYTES = 2**20  # names and shapes of a file of weights

Adapter: TypeAlias = tuple[Tensor, Tensor, float]  # A [rank, in], B [out, rank] and s: a weight W becomes W + s * B @ A


@dataclass(frozen=True)
class Weights:
    """Weights of one training step. Picklable; the process that packed them must live as long as they are used."""

    version: int  # finished optimizer steps of the trainer
    start_path: str  # checkpoint of the same architecture; adapters are merged into its weights
    kind: Literal["full", "lora"]
    chunks: tuple[Any, ...]  # references to objects {name: array}, or {name: (A, B, scale)} for lora
    num_bytes: int

    @property
    def key(self) -> str:
        """Name that differs between any two packed weights, also of two runs that number their steps alike."""
        return f"version {self.version} in {self.chunks[0].hex()}"


@dataclass(frozen=True)
class SentWeights:
    """Weights of one training step that went to the engines and are kept nowhere else; fields as those of `Weights`."""

    version: int
    start_path: str
    backend: str
    send_id: str
    num_bytes: int

    @property
    def key(self) -> str:
        """Name that differs between any two sends."""
        return f"version {self.version} sent as {self.send_id}"


class WeightsLostError(WorkError):
    """An engine was asked for sent weights that it does not hold, and nobody else holds them either."""


# The path of a checkpoint, packed weights, or weights that were sent.
WeightSource: TypeAlias = str | Weights | SentWeights


def key_of(source: WeightSource) -> str:
    return source if isinstance(source, str) else source.key


def version_of(source: WeightSource) -> int | None:
    return None if isinstance(source, str) else source.version


def pack(state: Mapping[str, Tensor], version: int, start_path: str) -> Weights:
    """Puts whole weights into the object store."""
    return _put({name: to_array(tensor) for name, tensor in state.items()}, version, start_path, "full")


def pack_lora(adapters: Mapping[str, Adapter], version: int, start_path: str) -> Weights:
    """Puts adapters into the object store; engines merge them into the start checkpoint."""
    arrays = {name: (to_array(a_RI), to_array(b_OR), scale) for name, (a_RI, b_OR, scale) in adapters.items()}
    return _put(arrays, version, start_path, "lora")


def checkpoint_tensors(
    weights: Weights, dtype: torch.dtype, *, tied: bool, timeout_s: float
) -> Iterator[tuple[str, Tensor]]:
    """Returns the tensors of a checkpoint with these weights, for the loader of an engine.

    The payload is fetched and its names are compared with those of the start checkpoint before the first tensor is
    given, since a loader that fails half-way, or that misses a tensor silently, leaves a mixture of two models.
    """
    payload, files = _fetch(weights, timeout_s), tensor_files(Path(weights.start_path))
    check_names(weights, payload.keys(), tied=tied)
    if weights.kind == "lora":
        return _merged(files, payload, dtype)
    return ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in payload.items())


def check_names(weights: Weights | SentWeights, names: Collection[str], *, tied: bool) -> None:
    """Compares names of tensors, or of the weights that adapters belong to, with those of the start checkpoint."""
    files = tensor_files(Path(weights.start_path))
    kind = weights.kind if isinstance(weights, Weights) else "full"
    needed = {name for name in files if not is_optional_tensor(name) and not (tied and is_head_tensor(name))}
    missing, problem = (
        (set(names) - files.keys(), "hold adapters for tensors that are not there")
        if kind == "lora"
        else (needed - set(names), "lack tensors that are there")
    )
    if missing:
        raise WorkError(
            f"The {kind} weights of version {weights.version} do not fit {weights.start_path}: they {problem}, "
            f"{len(missing)} in all ({', '.join(sorted(missing)[:3])}).",
            "Name tensors as the checkpoint's safetensors files do.",
        )


@contextmanager
def checkpoint_folder(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Writes tensors into a folder, in memory where there is room, for processes that share nothing else.

    The folder is gone when the context ends; one that a killed process left behind is removed by the next call.
    """
    _sweep()
    state = {name: tensor.contiguous() for name, tensor in tensors}
    size = sum(tensor.nbytes for tensor in state.values()) + _HEADER_BYTES
    # A container has 64 MB of it unless told otherwise.
    fits = os.path.isdir(_MEMORY) and shutil.disk_usage(_MEMORY).free > size
    root = _MEMORY if fits else None
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as folder, _claimed(Path(folder)):
        save_file(state, f"{folder}/model.safetensors")
        del state
        yield folder


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Holds a lock in a folder, which the system releases however this process ends."""
    with (folder / ".claim").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        (folder / ".claim").rename(folder / _CLAIM)  # under this name it has never been unlocked
        yield


def _sweep() -> None:
    """Removes folders of processes that were killed: each is as large as a model, in memory."""
    for root in {_MEMORY, tempfile.gettempdir()}:
        for claim in Path(root).glob(f"{_PREFIX}*/{_CLAIM}"):
            with suppress(OSError), claim.open() as file:  # BlockingIOError: its owner is alive
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(claim.parent, ignore_errors=True)


def _merged(files: Mapping[str, str], adapters: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                weight_OI = tensors.get_tensor(name)
                if name in adapters:
                    a_RI, b_OR, scale = adapters[name]
                    weight_OI = weight_OI.float() + (b_OR.float() @ a_RI.float()) * scale
                yield name, weight_OI.to(dtype) if weight_OI.is_floating_point() else weight_OI


def _put(items: Mapping[str, Any], version: int, start_path: str, kind: Literal["full", "lora"]) -> Weights:
    """Stores named arrays in objects of bounded size; a tensor larger than a chunk is an object by itself."""
    chunks: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, item in items.items():
        num_bytes = item.nbytes if kind == "full" else item[0].nbytes + item[1].nbytes
        if chunks[-1] and filled + num_bytes > _CHUNK_BYTES:
            chunks.append({})
            filled = 0
        chunks[-1][name] = item
        filled += num_bytes
        total += num_bytes
    return Weights(version, start_path, kind, tuple(ray.put(chunk) for chunk in chunks), total)


def _fetch(weights: Weights, timeout_s: float) -> dict[str, Any]:
    """Returns the payload as tensors that share the object store's read-only memory."""
    chunks = wait_for(
        list(weights.chunks), who="object store", what=f"the weights of version {weights.version}", timeout_s=timeout_s
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to them
        if weights.kind == "full":
            return {name: view_tensor(array) for chunk in chunks for name, array in chunk.items()}
        return {
            name: (view_tensor(a), view_tensor(b), scale) for chunk in chunks for name, (a, b, scale) in chunk.items()
        }
