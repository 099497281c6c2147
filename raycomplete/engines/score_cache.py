"""Scores of frozen models never change, so each sequence is read once: kept in memory, and on disk if asked for."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from raycomplete.engines.payload import HiddenArray, ScoreRequest
from raycomplete.runtime.files import write_bytes

logger = logging.getLogger(__name__)

_ABANDONED_S = 3600.0


class ScoreCache:
    """Hidden states by (model, tokens).

    Args:
        model_key: Names weights, head spec and dtype; scores under another key are never returned.
        memory_bytes: Upper bound of what is kept in memory, least recently used out first.
        folder: Cache on disk, shared by runs; None keeps scores in memory only.
        disk_bytes: About what the folder may hold, of all models together.
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
        """The scores of a sequence, or None if it was never read."""
        key = self._key(request)
        array = self._held.get(key)
        if array is not None:
            self._held.move_to_end(key)
        elif self._folder is not None and (file := self._file(key)).is_file():
            array = self._read(file, request)
            if array is not None:
                self._hold(key, array)
                with suppress(OSError):
                    os.utime(file)  # used now
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
        """Measures the folder once in a twentieth of its limit, and drops what was used longest ago."""
        assert self._folder is not None
        self._until_sweep -= size
        if self._until_sweep >= 0:
            return
        self._until_sweep = self._disk_bytes // 20
        files = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError):  # another actor sweeps, too
                status = path.stat()
                if path.suffix == ".npy":
                    files.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > _ABANDONED_S:
                    path.unlink()  # of a writer that was killed
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
