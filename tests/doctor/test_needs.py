"""A run's needs follow its settings."""

from __future__ import annotations

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor.findings import Context
from raycomplete.doctor.needs import GIB, needs_of, num_params
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"


def context(*overrides: str) -> Context:
    return Context(RUN_FILE, load_run_file(RUN_FILE, overrides))


def test_needs_follow_the_model_and_the_settings() -> None:
    from safetensors import safe_open

    folder = ROOT / "raycomplete" / "data" / "organism" / "checkpoints" / "base"
    with safe_open(str(folder / "model.safetensors"), framework="np") as tensors:
        counted = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert num_params("organism:base") == num_params(str(folder)) == counted
    assert num_params("hub:org/name") is None
    one, two = (needs_of(context(f"train.num_workers={count}").config) for count in (1, 2))  # type: ignore[arg-type]
    assert two.host_bytes > one.host_bytes
    assert (one.cpus, two.cpus) == (2.0, 2.5)
    assert one.disk_bytes == counted * (12 * 3 + 4), "two kept, one being written, and the student"


def test_needs_count_every_replica() -> None:
    one, more = (needs_of(context(f"teacher.replicas={count}").config) for count in (1, 3))  # type: ignore[arg-type]
    assert more.cpus - one.cpus == 4 * 0.5
    assert more.host_bytes - one.host_bytes > 4 * GIB
    assert more.gpu_share == pytest.approx(one.gpu_share + 4 * 0.25)
