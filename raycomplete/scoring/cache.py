"""Scores of frozen models never change, so each sequence is read once: kept in memory, and on disk if asked for."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import OrderedDict
from pathlib import Path

import numpy as np

from raycomplete.files import write_bytes
from raycomplete.scoring.payload import HiddenArray, ScoreRequest

logger = logging.getLogger(__name__)


class ScoreCache:
    """Hidden states by (model, tokens).

    Args:
        model_key: Names weights, head spec and dtype; scores under another key are never returned.
        memory_bytes: Upper bound of what is kept in memory, least recently used out first.
        folder: Cache on disk, shared by runs; None keeps scores in memory only.
    """

    def __init__(self, model_key: str, memory_bytes: int, folder: Path | None = None) -> None:
        self._model_key = model_key
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._held: OrderedDict[str, HiddenArray] = OrderedDict()
        self._held_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, request: ScoreRequest) -> HiddenArray | None:
        """The scores of a sequence, or None if it was never read."""
        key = self._key(request)
        array = self._held.get(key)
        if array is not None:
            self._held.move_to_end(key)
        elif self._folder is not None and (file := self._file(key)).is_file():
            array = self._read(file, request)
            if array is not None:
                self._hold(key, array)
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
                write_bytes(self._file(key), buffer.getvalue())
            except OSError as error:  # a full disk costs the cache, not the run
                logger.warning("The score cache in %s cannot be written (%s) and is now off.", self._folder, error)
                self._folder = None

    def _hold(self, key: str, array: HiddenArray) -> None:
        if key in self._held:
            return
        self._held[key] = array
        self._held_bytes += array.nbytes
        while self._held_bytes > self._memory_bytes and self._held:
            _, dropped = self._held.popitem(last=False)
            self._held_bytes -= dropped.nbytes

    def _key(self, request: ScoreRequest) -> str:
        tokens = np.asarray(request.token_ids, dtype=np.int64).tobytes()
        head = f"{self._model_key}:{request.num_prompt_tokens}:".encode()
        return hashlib.sha256(head + tokens).hexdigest()

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.npy"

    @staticmethod
    def _read(file: Path, request: ScoreRequest) -> HiddenArray | None:
        """A damaged file counts as never read: the engine makes it anew."""
        try:
            array: HiddenArray = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if array.ndim == 2 and array.shape[0] == request.num_rows else None
