"""Ray actors that host the frozen models, and the client that others call them through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raycomplete.config import ScoringConfig
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.head_spec import HeadSpec, load_head
from raycomplete.observe import begin, scored
from raycomplete.ray_calls import wait_for
from raycomplete.scoring.cache import ScoreCache
from raycomplete.scoring.engine import PoolingEngine
from raycomplete.scoring.parity import check_parity
from raycomplete.scoring.payload import HiddenArray, ScoreRequest, to_tensor
from raycomplete.types import ModelRole


@dataclass(frozen=True)
class ScorerOptions:
    """What a scorer needs to know besides its head spec."""

    role: ModelRole
    dtype: Any
    max_length: int
    use_gpu: bool
    scoring: ScoringConfig
    trust_remote_code: bool = False


class Scorer:
    """One frozen model on a pooling engine. `ScoringClient` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself.
    """

    def __init__(self, spec: HeadSpec, options: ScorerOptions, parity_requests: list[ScoreRequest]) -> None:
        begin(f"{options.role} scorer")
        self._spec = spec
        self._options = options
        self._parity_requests = parity_requests
        scoring = options.scoring
        self._cache = ScoreCache(
            f"{spec.model_fingerprint}:{spec.tokenizer_hash}:{options.dtype}",
            int(scoring.cache_gib * 2**30),
            scoring.cache_dir,
        )
        self._engine: PoolingEngine | None = None
        self._facts: dict[str, Any] = {}
        self._tokens_read = 0
        self._seconds = 0.0

    def facts(self) -> dict[str, Any]:
        """Start-up times, parity report and head spec; answering it means the scorer is ready."""
        self._ready_engine()
        return self._facts

    def score(self, requests: list[ScoreRequest]) -> list[HiddenArray]:
        """[T, H] hidden states of each request's response rows; sequences read before are not read again."""
        engine = self._ready_engine()
        started = time.perf_counter()
        arrays = [self._cache.get(request) for request in requests]
        # One batch may hold a sequence twice; it is read once.
        missing = list(dict.fromkeys(request for request, array in zip(requests, arrays, strict=True) if array is None))
        fresh = dict(zip(missing, engine.hidden_states(missing), strict=True)) if missing else {}
        for request, array in fresh.items():
            self._cache.put(request, array)
        tokens = sum(len(request.token_ids) - 1 for request in missing)
        seconds = time.perf_counter() - started if missing else 0.0
        self._tokens_read, self._seconds = self._tokens_read + tokens, self._seconds + seconds
        misses = sum(array is None for array in arrays)
        scored(tokens=tokens, seconds=seconds, hits=len(arrays) - misses, misses=misses)
        return [fresh[request] if array is None else array for request, array in zip(requests, arrays, strict=True)]

    def warm(self, requests: list[ScoreRequest]) -> None:
        """Reads sequences into the cache ahead of the call that needs them, without sending anything back."""
        self.score(requests)

    def stats(self) -> dict[str, float]:
        """Work done so far: tokens read by the engine, seconds in it, cache hits and misses."""
        return {
            "tokens": self._tokens_read,
            "seconds": self._seconds,
            "hits": self._cache.hits,
            "misses": self._cache.misses,
        }

    def _ready_engine(self) -> PoolingEngine:
        """The engine, started and proved against transformers."""
        if self._engine is not None:
            return self._engine
        spec, options = self._spec, self._options
        started = time.perf_counter()
        engine = PoolingEngine(
            spec.path,
            dtype=options.dtype,
            max_length=options.max_length,
            use_gpu=options.use_gpu,
            gpu_memory_utilization=options.scoring.gpu_memory_utilization,
            max_num_batched_tokens=options.scoring.max_num_batched_tokens,
            trust_remote_code=options.trust_remote_code,
        )
        engine_start_s = time.perf_counter() - started
        parity = check_parity(
            engine,
            load_head(spec, dtype=TORCH_DTYPES[options.dtype]),
            Path(spec.path),
            self._parity_requests,
            role=options.role,
            dtype=options.dtype,
            tolerance=options.scoring.parity_tolerance,
            trust_remote_code=options.trust_remote_code,
        )
        self._engine = engine
        self._facts = {
            "role": options.role,
            "engine_start_s": engine_start_s,
            "start_s": time.perf_counter() - started,
            "parity": parity.to_json(),
            "head": spec.to_json(),
        }
        return engine


class ScoringClient:
    """Handle on one scorer actor; picklable, so training workers can hold it.

    Args:
        role: base or aligned.
        actor: Handle of a `Scorer` actor.
        timeout_s: Longest wait for one batch.
    """

    def __init__(self, role: ModelRole, actor: Any, timeout_s: float) -> None:
        self.role = role
        self._actor = actor
        self._timeout_s = timeout_s

    @classmethod
    def start(
        cls,
        spec: HeadSpec,
        options: ScorerOptions,
        parity_requests: list[ScoreRequest],
        *,
        num_cpus: float,
        num_gpus: float,
        environment: dict[str, str],
    ) -> ScoringClient:
        """Asks Ray for the actor and returns at once; `facts` waits for it."""
        actor = (
            ray.remote(Scorer)
            .options(
                num_cpus=num_cpus,
                num_gpus=num_gpus if options.use_gpu else 0,
                runtime_env={"env_vars": environment},
                max_restarts=2,
                max_task_retries=2,  # scoring is idempotent by content, so a retried call is safe
            )
            .remote(spec, options, parity_requests)
        )
        return cls(options.role, actor, options.scoring.timeout_s)

    def facts(self, timeout_s: float) -> dict[str, Any]:
        """Waits until the scorer is ready and returns its facts."""
        facts: dict[str, Any] = self._get(self._actor.facts.remote(), timeout_s, "its start")
        return facts

    def submit(self, requests: Sequence[ScoreRequest]) -> Any:
        """Starts scoring and returns a reference for `collect`."""
        return self._actor.score.remote(list(requests))

    def collect(self, reference: Any) -> list[HiddenArray]:
        """Waits for the scores that `submit` started."""
        arrays: list[HiddenArray] = self._get(reference, self._timeout_s, "a batch of scores")
        return arrays

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        """As `submit`, from (token ids, number of prompt tokens) pairs."""
        return self.submit([ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences])

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Lets the scorer read sequences ahead. Nobody waits for it: what it has not read yet is read when asked."""
        self._actor.warm.remote([ScoreRequest(tokens, num_prompt) for tokens, num_prompt in sequences])

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        """As `collect`, as tensors on the CPU."""
        return [to_tensor(array) for array in self.collect(reference)]

    def stats(self) -> dict[str, float]:
        """Work done so far (see `Scorer.stats`)."""
        stats: dict[str, float] = self._get(self._actor.stats.remote(), self._timeout_s, "its statistics")
        return stats

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        ray.kill(self._actor)

    def _get(self, reference: Any, timeout_s: float, what: str) -> Any:
        return wait_for(reference, who=f"{self.role} scorer", what=what, timeout_s=timeout_s)
