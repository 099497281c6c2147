"""Fixtures that several rooms share: one Ray cluster and one set of engines for the whole session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: engines and trainers share the cores


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with more logical CPUs than cores, so that every role of a test can be placed."""
    import ray

    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2**30,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},  # workers unpickle helpers of the tests
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def generator(ray_cluster: None) -> Iterator[Any]:
    """A rollout actor on the organism's base."""
    from raycomplete.config import RolloutConfig
    from raycomplete.data.chat import ChatCodec
    from raycomplete.data.organism import checkpoint_path
    from raycomplete.engines.rollout_pool import RolloutPool
    from raycomplete.engines.rollout_worker import RolloutOptions
    from raycomplete.engines.spec import EngineSpec

    codec = ChatCodec(checkpoint_path("aligned"))
    spec = EngineSpec(str(checkpoint_path("base")), "float32", 256)
    client = RolloutPool.start(RolloutOptions(spec, tuple(sorted(codec.eos_ids)), RolloutConfig(timeout_s=300)))
    client.wait_until_ready(timeout_s=300)
    yield client
    client.stop()
