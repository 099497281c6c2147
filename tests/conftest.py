"""Shared by several rooms: one Ray cluster and one set of engines for the whole session, and the tracked files."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: engines and trainers share the cores


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks; without git the test is skipped."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for line in done.stdout.splitlines() if (path := ROOT / line).is_file())


def tracked_python(*folders: str) -> list[Path]:
    """The tracked Python files below these folders of the repository, sorted."""
    parents = {ROOT / folder for folder in folders}
    return sorted(path for path in tracked_files() if path.suffix == ".py" and parents & {*path.parents})


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
    client = RolloutPool.start(RolloutOptions(spec, tuple(sorted(codec.eos_ids)), RolloutConfig()))
    client.wait_until_ready(timeout_s=300)
    yield client
    client.stop()
