"""The Ray actor around one generating engine."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from raycomplete.config import Dtype, RolloutConfig
from raycomplete.engines.rollout_engine import RolloutEngine
from raycomplete.engines.weights import WeightSource
from raycomplete.runtime.prometheus import begin, record, rolled_out


@dataclass(frozen=True)
class RolloutOptions:
    """What a rollout actor needs to know besides its checkpoint."""

    dtype: Dtype
    max_length: int
    use_gpu: bool
    stop_ids: tuple[int, ...]
    rollout: RolloutConfig
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answer:
    """What a call brought, and by whom.

    Attributes:
        value: Responses or log-probabilities.
        version: Of the weights that were in the engine (None: a checkpoint).
        incarnation: Name of the process; another one after a restart.
        seconds: Time in the engine, loading left out.
        load_s: Time for loading weights; 0 where they were there already.
    """

    value: Any
    version: int | None
    incarnation: str
    seconds: float
    load_s: float


class RolloutWorker:
    """One generating engine. `RolloutPool` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself. Every call names the weights that it
    needs, so a restarted actor can never answer with the wrong model.
    """

    def __init__(self, path: str, options: RolloutOptions) -> None:
        begin("rollout engine")
        self._path = path
        self._options = options
        self._engine: RolloutEngine | None = None
        self._start_s = 0.0
        self._incarnation = uuid.uuid4().hex

    def startup_stats(self) -> dict[str, Any]:
        """Start-up time; answering it means the actor is ready."""
        self._ready_engine()
        return {"start_s": self._start_s, "incarnation": self._incarnation}

    def generate(
        self,
        weights: WeightSource,
        sequences: list[list[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | None,
    ) -> Answer:
        """Continues sequences with these weights, loading them first if others are in the engine."""
        engine, load_s = self._engine_with(weights)
        started = time.perf_counter()
        responses = engine.generate_finished(sequences, max_tokens, temperature, top_p, top_k, seed)
        seconds = time.perf_counter() - started
        rolled_out(tokens=sum(len(tokens) for tokens, _ in responses), seconds=seconds)
        return Answer(responses, engine.version, self._incarnation, seconds, load_s)

    def log_probs(self, weights: WeightSource, sequences: list[tuple[list[int], int]]) -> Answer:
        """Log-probabilities of responses under these weights (see `RolloutEngine.log_probs`)."""
        engine, load_s = self._engine_with(weights)
        started = time.perf_counter()
        log_probs = engine.log_probs(sequences)
        return Answer(log_probs, engine.version, self._incarnation, time.perf_counter() - started, load_s)

    def _engine_with(self, weights: WeightSource) -> tuple[RolloutEngine, float]:
        engine = self._ready_engine()
        started = time.perf_counter()
        try:
            loaded = engine.load(weights, timeout_s=self._options.rollout.sync_timeout_s)
        finally:
            if not engine.is_whole:
                self._engine = None  # the next call starts a new one
        if not loaded:
            return engine, 0.0
        seconds = time.perf_counter() - started
        record("weight_load_seconds", seconds)
        return engine, seconds

    def _ready_engine(self) -> RolloutEngine:
        if self._engine is None:
            options = self._options
            started = time.perf_counter()
            self._engine = RolloutEngine(
                self._path,
                dtype=options.dtype,
                max_length=options.max_length,
                use_gpu=options.use_gpu,
                gpu_memory_utilization=options.rollout.gpu_memory_utilization,
                trust_remote_code=options.trust_remote_code,
                stop_ids=options.stop_ids,
                sleeps=options.rollout.colocated,
                tensor_parallel=options.rollout.tensor_parallel,
            )
            self._start_s = time.perf_counter() - started
        return self._engine
