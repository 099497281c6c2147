"""The Ray actor that generates text, and the client that others call it through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raycomplete.config import Dtype, RolloutConfig
from raycomplete.ray_calls import wait_for
from raycomplete.rollout.engine import RolloutEngine

_SLICE = 256  # sequences of one call, as many as an engine runs side by side


@dataclass(frozen=True)
class RolloutOptions:
    """What a rollout actor needs to know besides its checkpoint."""

    dtype: Dtype
    max_length: int
    use_gpu: bool
    stop_ids: tuple[int, ...]
    rollout: RolloutConfig
    trust_remote_code: bool = False


class RolloutWorker:
    """One generating engine. `RolloutClient` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself.
    """

    def __init__(self, path: str, options: RolloutOptions) -> None:
        self._path = path
        self._options = options
        self._engine: RolloutEngine | None = None
        self._start_s = 0.0

    def facts(self) -> dict[str, Any]:
        """Start-up time; answering it means the actor is ready."""
        self._ready_engine()
        return {"start_s": self._start_s}

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
            )
            self._start_s = time.perf_counter() - started
        return self._engine

    def generate(
        self,
        path: str,
        sequences: list[list[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
    ) -> list[tuple[list[int], bool]]:
        """Continues sequences with the weights at `path`, loading them first if others are in the engine.

        The path travels with every call, so a restarted actor can never answer with the wrong model.
        """
        engine = self._ready_engine()
        engine.load(path)
        return engine.generate_finished(sequences, max_tokens, temperature, top_p, seed)


class RolloutClient:
    """One model behind a rollout actor (implements `raycomplete.types.Generator`).

    Several clients may share an actor: each names its own weights with every call.
    """

    def __init__(self, actor: Any, path: str, timeout_s: float) -> None:
        self._actor = actor
        self.path = path
        self._timeout_s = timeout_s

    @classmethod
    def start(
        cls, path: str, options: RolloutOptions, *, num_cpus: float, num_gpus: float, environment: dict[str, str]
    ) -> RolloutClient:
        """Asks Ray for the actor and returns at once; `facts` waits for it."""
        actor = (
            ray.remote(RolloutWorker)
            .options(
                num_cpus=num_cpus,
                num_gpus=num_gpus if options.use_gpu else 0,
                runtime_env={"env_vars": environment},
                max_restarts=2,
                max_task_retries=2,  # seeded sampling from named weights: a retried call gives the same tokens
            )
            .remote(path, options)
        )
        return cls(actor, path, options.rollout.timeout_s)

    def with_weights(self, path: str) -> RolloutClient:
        """The same actor with other weights of the same architecture."""
        return RolloutClient(self._actor, path, self._timeout_s)

    def facts(self, timeout_s: float) -> dict[str, Any]:
        """Waits until the actor is ready and returns its facts."""
        facts: dict[str, Any] = wait_for(
            self._actor.facts.remote(), who="rollout engine", what="its start", timeout_s=timeout_s
        )
        return facts

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """New token ids of each sequence, end-of-response left out."""
        finished = self.generate_finished(
            sequences, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return [tokens for tokens, _ in finished]

    def generate_finished(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[tuple[list[int], bool]]:
        """As `generate`, and whether each response ended by itself rather than by the token limit."""
        answers: list[tuple[list[int], bool]] = []
        for start in range(0, len(sequences), _SLICE):  # so that the timeout bounds one slice, however long the list
            part = [list(sequence) for sequence in sequences[start : start + _SLICE]]
            reference = self._actor.generate.remote(
                self.path, part, max_tokens, temperature, top_p, None if seed is None else seed + start
            )
            answers += wait_for(
                reference, who="rollout engine", what=f"{len(part)} responses", timeout_s=self._timeout_s
            )
        return answers

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        ray.kill(self._actor)
