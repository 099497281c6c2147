"""Calls under way, and what a handle has seen of the engines that answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakSet

import ray

from raycomplete.engines.rollout_worker import Answer


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """Responses under way.

    Attributes:
        version: Of the weights that they are made with; None for a checkpoint.
        num_sequences: How many responses `RolloutPool.collect` will bring.
        parts: (engine, number of sequences, reference) in the order of the sequences.
    """

    version: int | None
    num_sequences: int
    parts: tuple[tuple[int, int, Any], ...]


@dataclass
class PoolStats:
    """What one handle has seen of its engines; shared by the handles that `with_weights` makes of it."""

    tokens: int = 0
    seconds: float = 0.0
    loads: int = 0
    load_s: float = 0.0
    restarts: int = 0
    incarnations: dict[int, str] = field(default_factory=dict)
    open: WeakSet[RolloutCall] = field(default_factory=WeakSet)
    lock: Lock = field(default_factory=Lock)  # of `open`: one thread may collect while another submits

    def __reduce__(self) -> tuple[Any, ...]:
        """A handle that crosses a process boundary counts from zero, but knows who it will meet."""
        return (PoolStats, (0, 0.0, 0, 0.0, 0, self.incarnations))

    def meet(self, engine: int, incarnation: str) -> None:
        """Notes which process stands behind an engine; another one than before is a restart."""
        self.restarts += self.incarnations.get(engine, incarnation) != incarnation
        self.incarnations[engine] = incarnation

    def enter(self, engine: int, answer: Answer) -> None:
        """Adds an answer's costs."""
        self.meet(engine, answer.incarnation)
        self.seconds += answer.seconds
        self.loads += answer.load_s > 0
        self.load_s += answer.load_s

    def num_unfinished(self) -> int:
        """Parts of calls that no engine has answered yet."""
        with self.lock:
            references = [reference for call in self.open for _, _, reference in call.parts]
        return len(ray.wait(references, num_returns=len(references), timeout=0)[1]) if references else 0
