"""Shared by several rooms: one Ray cluster and one set of engines for the whole session, and the tracked files."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raycomplete(*arguments: str, folder: Path, timeout_s: float = 1100) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "raycomplete", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# Of the shipped run file, reduced: enough for a student that refuses in the middle of an answer.
REDUCED = (
    "data.limit_per_kind=144",
    "train.steps=100",
    "train.num_workers=2",
    "train.zero_stage=2",
    "train.checkpoint_every=50",
    "evaluation.num_prompts=24",
    "evaluation.depths=[0,4,16,64]",
)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of the organism, and what the command printed. Tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    result = raycomplete("train", str(ROOT / "jobs" / "organism.yaml"), *REDUCED, folder=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "runs" / "organism", result.stdout


@pytest.fixture(scope="session")
def finished_diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diagnosis of the organism's base and aligned, from 16 prompts of each kind."""
    folder = tmp_path_factory.mktemp("diagnosed")
    arguments = ("diagnose", str(ROOT / "jobs" / "organism.yaml"), "diagnose.num_prompts=16")
    result = raycomplete(*arguments, folder=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "runs" / "organism-diagnosis"


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
