"""A second engine for rollout tests, which may be killed and may take other shapes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from raycomplete.engines import rollout_worker as engine
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions, RolloutWorker

_refresh = engine._refresh_tied_head


class Spare(RolloutWorker):
    """A worker that can change its model: importing vLLM takes longer than anything else in these tests."""

    def become(self, options: RolloutOptions, forget_head: bool) -> None:
        engine._refresh_tied_head = (lambda model: None) if forget_head else _refresh
        if options == self._options:
            return  # calls name their weights, so tests may share an engine
        self._engine = None
        gc.collect()
        self._options = options


@pytest.fixture(scope="session")
def spare(generator: RolloutPool) -> Iterator[Any]:
    """At first, and again after a restart, an engine like `generator`'s; its process finds no compiler."""
    without_compiler = {"CXX": "/nonexistent", "CC": "/nonexistent", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    environment = generator.options.spec.environment() | without_compiler
    actor = (
        ray.remote(Spare)
        .options(num_cpus=0.5, runtime_env={"env_vars": environment}, max_restarts=-1, max_task_retries=2)
        .remote(generator.options)
    )
    yield actor
    ray.kill(actor)
