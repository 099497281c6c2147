"""On-policy training whose weights are sent to a real engine, which dies in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raycomplete.config import RolloutConfig, TrainConfig, ValidationConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.samples import read_samples
from raycomplete.methods.registry import DepthConfig
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.runtime.types import Prompt
from raycomplete.training.rollout_engines import StudentEngines
from raycomplete.training.trainer import fit
from tests.engines import tiny as engine_tiny
from tests.engines.file_transfer import file_pool
from tests.training.tiny import CountingJudge, completion, make_job

ROLLOUT = RolloutConfig(
    on_policy=True, max_student_tokens=4, max_refusal_tokens=4, sync_timeout_s=240, timeout_s=300, lookahead=1
)
# In the training worker: the carrier, and the engine's death before it is asked for the rollouts of the third step.
PLUGIN = """
import os, signal
from pathlib import Path
import ray
from raycomplete.training.rollout_engines import StudentEngines
from tests.engines.file_transfer import register_carrier

folder = Path({folder!r})
register_carrier(folder)
submit = StudentEngines.submit

def submit_after_a_death(self, batch, seed):
    if batch.step == 2 and not (folder / "dead").exists():
        (folder / "dead").touch()
        process = ray.get(self._pool._actors[0].__ray_call__.remote(lambda worker: os.getpid()), timeout=120)
        os.kill(process, signal.SIGKILL)
    return submit(self, batch, seed)

StudentEngines.submit = submit_after_a_death
"""


@pytest.mark.slow
def test_training_goes_on_by_the_store_after_an_engine_died_with_sent_weights(
    ray_cluster: None, tmp_path: Path
) -> None:
    for seed, role in enumerate(("base", "aligned")):
        engine_tiny.make_model(tmp_path / role, seed, tied=True, dtype="float32")
    plugin, carried = tmp_path / "plugin.py", tmp_path / "carried"
    carried.mkdir()
    plugin.write_text(PLUGIN.format(folder=str(carried)))
    train = TrainConfig(
        steps=4, lr=1e-2, warmup_steps=1, per_device_batch_size=4, loss_chunk_tokens=16, checkpoint_every=4,
        stall_timeout_s=600.0, validation=ValidationConfig(every=0),
    )  # fmt: skip
    job = make_job(tmp_path, train, completion(depth=DepthConfig(min=1, max=8, bins=4)))
    samples = read_samples(job.samples)
    prompts = [Prompt(sample.prompt_id, "x", "harmful") for sample in (*samples.anchor, *samples.recovery)]
    given = engine_tiny.options(job.start)
    options = replace(given, spec=replace(given.spec, weight_transfer="file"), rollout=ROLLOUT)
    with file_pool(options) as pool:
        engines = StudentEngines(pool, ChatCodec(job.start), CountingJudge(), prompts, ROLLOUT)
        fit(
            replace(job, rollout=ROLLOUT, student_engines=engines, plugins=(plugin,)),
            cpus_per_worker=0.5,
            gpus_per_worker=0,
        )
    rows = read_metrics(job.metrics_file)
    assert [row["sync"]["transfer"] for row in rows] == ["file", "file", "store", "store"]
    assert [row["sync"]["version"] for row in rows] == [0, 1, 2, 3]
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1], "the third step's rollouts were made again"
    assert all(row["sync"]["mean_abs_difference"] < 1e-4 for row in rows)
    assert all(row["rollout_tokens"] > 0 for row in rows)
