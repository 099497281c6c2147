"""Sequences to score, the arrays of hidden states that answer them, and the cache that keeps those arrays.

numpy has no bfloat16, so bf16 rows travel as uint16 bit patterns: Ray's object store hands numpy arrays to every
process of a node without copying. Scores of frozen models never change, so each sequence is read once and kept in
memory, and on disk if asked for.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raycomplete.runtime.files import write_bytes

logger = logging.getLogger(__name__)

HiddenArray = npt.NDArray[np.uint16] | npt.NDArray[np.float32]

_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to read, and where its response starts.

    Attributes:
        token_ids: Prompt followed by response tokens.
        num_prompt_tokens: Tokens before the response, at least 1.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompt_tokens < len(self.token_ids):
            raise ValueError(
                f"a score request needs at least one prompt and one response token, got {self.num_prompt_tokens} "
                f"prompt tokens of {len(self.token_ids)}"
            )

    @property
    def num_rows(self) -> int:
        """Number of response tokens, one row of hidden states each."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def name(self) -> str:
        """Name of the sequence that does not give its tokens away: 32 hexadecimal digits."""
        return self.key()[:32]

    def key(self, prefix: str = "") -> str:
        """Returns a SHA-256 of the sequence, and of a prefix that tells equal sequences of several models apart."""
        tokens = np.asarray(self.token_ids, dtype=np.int64).tobytes()
        return hashlib.sha256(f"{prefix}{self.num_prompt_tokens}:".encode() + tokens).hexdigest()


def to_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Turns a tensor into an array of the same bits; those of bfloat16 become uint16, which no tensor here has."""
    tensor = tensor.detach().cpu().contiguous()
    array: npt.NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def view_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Restores the tensor given to `to_array`, over the memory of the array."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def to_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Restores the tensor given to `to_array`; it shares no memory with the object store's read-only array."""
    return view_tensor(np.array(array))


class ScoreCache:
    """Hidden states by (model, tokens).

    Args:
        model_key: Names weights, head spec and dtype; scores under another key are never returned.
        memory_bytes: Upper bound of what is kept in memory, least recently used out first.
        folder: Cache on disk, shared by runs; None keeps scores in memory only.
        disk_bytes: Approximate upper bound of what the folder holds, all models together.
    """

    def __init__(
        self, model_key: str, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 50 * 2**30
    ) -> None:
        self._model_key = model_key
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._until_sweep = 0  # bytes that may be written before the folder is measured again
        self._held: OrderedDict[str, HiddenArray] = OrderedDict()
        self._held_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, request: ScoreRequest) -> HiddenArray | None:
        """Returns the scores of a sequence, or None if it was never read."""
        key = self._key(request)
        array = self._held.get(key)
        if array is not None:
            self._held.move_to_end(key)
        elif self._folder is not None and (file := self._file(key)).is_file():
            array = self._read(file, request)
            if array is not None:
                self._hold(key, array)
                with suppress(OSError):
                    os.utime(file)  # the sweep drops files by the time of their last use
        if array is None:
            self.misses += 1
        else:
            self.hits += 1
        return array

    def put(self, request: ScoreRequest, array: HiddenArray) -> None:
        """Keeps the scores of a sequence."""
        key = self._key(request)
        self._hold(key, array)
        if self._folder is not None:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            try:
                self._make_room(buffer.tell())
                write_bytes(self._file(key), buffer.getvalue())
            except OSError as error:  # a full disk costs the cache, not the run
                logger.warning("The score cache in %s cannot be written (%s) and is now off.", self._folder, error)
                self._folder = None

    def _make_room(self, size: int) -> None:
        """Measures the folder once every twentieth of its limit, and drops the files used longest ago."""
        assert self._folder is not None
        self._until_sweep -= size
        if self._until_sweep >= 0:
            return
        self._until_sweep = self._disk_bytes // 20
        files = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError):  # another actor may sweep at the same time
                status = path.stat()
                if path.suffix == ".npy":
                    files.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > _ABANDONED_S:
                    path.unlink()  # left by a writer that was killed
        total = sum(held for _, held, _ in files) + size + self._until_sweep
        for _, freed, path in sorted(files):
            if total <= self._disk_bytes:
                break
            path.unlink(missing_ok=True)
            total -= freed

    def _hold(self, key: str, array: HiddenArray) -> None:
        if key in self._held:
            return
        self._held[key] = array
        self._held_bytes += array.nbytes
        while self._held_bytes > self._memory_bytes and self._held:
            _, dropped = self._held.popitem(last=False)
            self._held_bytes -= dropped.nbytes

    def _key(self, request: ScoreRequest) -> str:
        return request.key(f"{self._model_key}:")

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.npy"

    @staticmethod
    def _read(file: Path, request: ScoreRequest) -> HiddenArray | None:
        """Reads a file of the cache; a damaged one counts as absent, so the engine makes it anew."""
        try:
            array: HiddenArray = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if array.ndim == 2 and array.shape[0] == request.num_rows else None
