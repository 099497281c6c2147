"""Sequences to score, the arrays of hidden states that answer them, and the cache that keeps those arrays.

numpy has no bfloat16, so bf16 rows travel as uint16 bit patterns: Ray's object store hands numpy arrays to every
process of a node without copying. Scores of frozen models never change, so each sequence is read once and kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

HiddenArray = npt.NDArray[np.uint16] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to read (prompt, then response), and the number of its prompt tokens, at least 1."""

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
        tokens = np.asarray(self.token_ids, dtype=np.int64).tobytes()
        return hashlib.sha256(f"{self.num_prompt_tokens}:".encode() + tokens).hexdigest()[:32]


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
    """Hidden states of one model by sequence; beyond `memory_bytes` the least recently used ones are dropped."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes, self._held_bytes = memory_bytes, 0
        self._held: OrderedDict[str, HiddenArray] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, request: ScoreRequest) -> HiddenArray | None:
        array = self._held.get(request.name)
        if array is None:
            self.misses += 1
            return None
        self._held.move_to_end(request.name)
        self.hits += 1
        return array

    def put(self, request: ScoreRequest, array: HiddenArray) -> None:
        name = request.name  # the tokens themselves would take a third as much again
        if name not in self._held:
            self._held[name] = array
            self._held_bytes += array.nbytes
        while self._held_bytes > self._memory_bytes and self._held:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
