"""Answers of engines, kept on disk piece by piece so that an interrupted sampling asks for none of them twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.runtime.files import PRIVATE, RowStore, content_hash

SAMPLING_FILE = "sampling.jsonl"
"""In the run folder until samples.jsonl is there, which has what was wanted of it."""


class CachedGenerator:
    """A handle on engines that looks for each piece of a call in a file first, and adds there what was missing.

    Pieces are cut without regard to what is there: rounding depends on the batch, and a resumed run must equal an
    undisturbed one.
    """

    def __init__(self, pool: RolloutPool, path: Path, advance: Callable[[int], None] = lambda done: None) -> None:
        self._pool, self._store, self._advance = pool, RowStore(path, mode=PRIVATE), advance

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        """Continues sequences (see `raycomplete.runtime.types.Generator.generate`)."""
        return [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]

    def generate_finished(
        self, sequences: Sequence[Sequence[int]], *, seed: int | None = None, **sampling: Any
    ) -> list[tuple[list[int], bool]]:
        """Continues sequences (see `RolloutPool.generate_finished`)."""
        pieces, size = [], self._pool.side_by_side
        for start in range(0, len(sequences), size):
            part = [list(sequence) for sequence in sequences[start : start + size]]
            settings = sampling | {"seed": None if seed is None else seed + start}
            key = content_hash([self._pool.path, self._pool.stop_ids, part, settings])
            pieces.append((key, part, settings))
        # All at once, so that no engine waits for the next piece.
        calls = {key: self._pool.submit(part, **more) for key, part, more in pieces if key not in self._store}
        answers: list[tuple[list[int], bool]] = []
        for key, _, _ in pieces:
            if key not in self._store:
                self._store.add([{"key": key, "answers": self._pool.collect(calls[key])}])
            answers += [(list(tokens), bool(finished)) for tokens, finished in self._store[key]["answers"]]
            self._advance(len(answers))
        return answers


@contextmanager
def sampled_from(run: Run, path: Path, title: str, total: int) -> Iterator[CachedGenerator]:
    """Yields a handle on the engines of a run with the weights of a checkpoint, under a progress bar.

    Answers are kept in the run folder until they are in samples.jsonl.
    """
    with run.console.progress(title, total) as advance:
        pool = run.engines.generator.with_weights(str(path))
        yield CachedGenerator(pool, run.folder / SAMPLING_FILE, lambda done: advance(done, ""))
