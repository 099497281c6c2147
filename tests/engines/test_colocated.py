"""An engine on the trainer's own GPU: it sleeps between batches and still takes weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycomplete.data.checkpoints import load_model
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.spec import EngineSpec
from tests.engines.tiny import log_probs_of, make_model, options, random_probe

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture
def pool(ray_cluster: None, tmp_path: Path) -> Iterator[RolloutPool]:
    path = make_model(tmp_path / "model", 0, tied=True, dtype="bfloat16")
    spec = EngineSpec(str(path), "bfloat16", 128, use_gpu=True, sleeps=True, num_gpus=0.5)
    pool = RolloutPool.start(replace(options(), spec=spec))
    yield pool
    pool.stop()


def free_bytes(worker: Any) -> tuple[int, int]:
    """Free memory of the device with the engine asleep and awake."""
    asleep = torch.cuda.mem_get_info()[0]
    with worker._engine._awake():
        awake = torch.cuda.mem_get_info()[0]
    return asleep, awake


def test_an_engine_that_sleeps_frees_the_device_and_takes_weights(pool: RolloutPool, tmp_path: Path) -> None:
    pool.wait_until_ready(timeout_s=300)
    asleep, awake = ray.get(pool._actors[0].__ray_call__.remote(free_bytes), timeout=60)
    assert asleep > awake + 2**30  # the key-value cache alone is larger
    probe = random_probe(0)
    for version in (1, 2):
        model = load_model(make_model(tmp_path / str(version), version, tied=True, dtype="bfloat16"), "bfloat16")
        weights = pool.pack(dict(model.named_parameters()), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert report.mean_abs_difference < 0.05
        texts = [pool.collect(pool.submit([[7, 8, 9]], max_tokens=8, weights=weights)) for _ in range(2)]
        assert texts[0] == texts[1]
