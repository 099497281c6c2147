"""Real Ray Train + DeepSpeed runs of the on-policy loop: weights in step, resume, early stopping, LoRA."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycomplete.config import RolloutConfig, TrainConfig, ValidationConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.methods.registry import DepthConfig
from raycomplete.runtime.files import read_json
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit
from tests.training.tiny import LocalStudentEngines, completion, make_job, steered

pytestmark = pytest.mark.slow

STEPS = 4
METHOD = completion(depth=DepthConfig(min=1, max=8, bins=4, measure="compliance"))
# The anchor's weight moves at every measurement: the tiny student starts nats away from its teacher.
STEERED = ValidationConfig(every=1, depths=[0, 4], max_tokens=6, kl_budget=0.5)
ROLLOUT = RolloutConfig(
    on_policy=True, max_student_tokens=4, max_refusal_tokens=4, anchor_on_policy=0.5, sync_every=2, lookahead=1
)


def settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 1,
        "per_device_batch_size": 2,
        "loss_chunk_tokens": 16,
        "checkpoint_every": 2,
        "stall_timeout_s": 240.0,
        "validation": STEERED,
    }
    return TrainConfig(**(values | changes))


def on_policy(folder: Path, train: TrainConfig, rollout: RolloutConfig = ROLLOUT, **model: Any) -> TrainJob:
    job = steered(make_job(folder, train, METHOD, **model))
    student_engines = LocalStudentEngines(job.start, rollout.max_student_tokens)
    return replace(job, rollout=rollout, student_engines=student_engines)


def run(job: TrainJob) -> list[dict[str, Any]]:
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    return read_metrics(job.metrics_file)


@pytest.fixture(scope="module")
def single(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One worker, no sharding: what the other runs must reproduce."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run(on_policy(folder, settings()))


def test_rollouts_are_as_fresh_as_the_run_file_says(single: tuple[Path, list[dict[str, Any]]]) -> None:
    """Weights go out before steps 1 and 3 (of 4); each batch is rolled out one step ahead."""
    rows = single[1]
    assert [row.get("sync", {}).get("version") for row in rows] == [0, None, 2, None]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 1]
    assert max(row["staleness"] for row in rows) <= ROLLOUT.max_staleness
    assert all(row["compliance"] == 0.5 for row in rows)
    assert all(row["rollout_tokens"] > 0 for row in rows)
    assert rows[-1]["anchor_weight"] != rows[0]["anchor_weight"]


def test_sharded_weights_reach_the_engines_and_the_loss_is_the_same(
    single: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """`LocalStudentEngines` compares its log-probabilities with the trainer's at every update."""
    rows = run(on_policy(tmp_path, settings(num_workers=2, zero_stage=3)))
    for row, expected in zip(rows, single[1], strict=True):
        for name in ("loss", "anchor", "recovery", "push_forward", "anchor_weight"):
            assert row[name] == pytest.approx(expected[name], rel=5e-4), (row["step"], name)
        found, wanted = row["validation"], expected["validation"]
        for name in ("compliance", "over_refusal", "meets_budgets", "best_step"):
            assert found[name] == wanted[name], (row["step"], name)
        assert found["kl"] == pytest.approx(wanted["kl"], rel=5e-4)
    first, second = (load_model(path / "student", "float32").state_dict() for path in (single[0], tmp_path))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.exhaustive
def test_weights_that_can_no_longer_be_sent_go_through_the_store_on_every_rank(
    single: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    job = on_policy(tmp_path, settings(num_workers=2, zero_stage=3))
    rows = run(replace(job, student_engines=LocalStudentEngines(job.start, ROLLOUT.max_student_tokens, sends_until=1)))
    assert [row["sync"]["transfer"] for row in rows if "sync" in row] == ["nccl", "store"]
    for row, expected in zip(rows, single[1], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=5e-4), row["step"]


def test_a_resumed_run_continues_with_the_very_rollouts(
    single: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, uninterrupted = single
    for name in ("base", "aligned", "checkpoints", "best"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "metrics.jsonl", tmp_path / "metrics.jsonl")
    (tmp_path / "checkpoints" / "step-000004" / "complete.json").unlink()
    rows = run(on_policy(tmp_path, settings()))
    for row, expected in zip(rows, uninterrupted, strict=True):
        for name in ("loss", "staleness", "rollout_tokens", "depth_probabilities", "anchor_weight", "validation"):
            assert row[name] == expected[name], (row["step"], name)
    first, second = (load_model(path / "student", "float32").state_dict() for path in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_travel_by_themselves(ray_cluster: None, tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"sync_every": 1, "lookahead": 0})
    rows = run(on_policy(tmp_path, settings(lora_rank=4), rollout))
    assert [row["sync"]["version"] for row in rows] == [0, 1, 2, 3]
    assert {row["staleness"] for row in rows} == {0}
    start, student = (load_model(tmp_path / name, "float32").state_dict() for name in ("base", "student"))
    changed = {name for name in start if not torch.equal(start[name], student[name])}
    assert changed
    assert all("_proj" in name for name in changed), "adapters sit on the projections"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("qwen3_moe", {"num_workers": 2, "zero_stage": 3}, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_moe", {"lora_rank": 4}, marks=pytest.mark.exhaustive),
        ("mixtral", {}),
    ],
)
def test_experts_are_trained_and_reach_the_engines_by_the_names_of_their_files(
    ray_cluster: None, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    rollout = ROLLOUT.model_copy(update={"sync_every": 1, "lookahead": 0})
    rows = run(on_policy(tmp_path, settings(steps=2, **changes), rollout, kind=kind))
    assert [row["sync"]["version"] for row in rows] == [0, 1]
    start, student = (
        {name: tensor for file in (tmp_path / role).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for role in ("base", "student")
    )
    assert start.keys() == student.keys()
    changed = {name for name in start if not torch.equal(start[name], student[name])}
    if "lora_rank" in changes:
        assert changed
        assert all(".self_attn." in name for name in changed), "neither router nor experts have adapters"
    else:
        assert changed == start.keys()


def test_training_stops_where_no_measurement_is_better_and_the_best_step_is_kept(
    ray_cluster: None, tmp_path: Path
) -> None:
    validation = STEERED.model_copy(update={"patience": 2})
    train = settings(steps=12, lr=0.3, checkpoint_every=6, validation=validation, sinks=["tensorboard"])
    job = steered(make_job(tmp_path, train, METHOD))
    rows = run(job)
    best = rows[-1]["validation"]["best_step"]
    assert len(rows) == best + 2 < 12, "two measurements without a better one"
    assert rows[-1]["stopped"]
    assert (job.checkpoints / f"step-{len(rows):06d}").is_dir(), "what follows the last step may be killed, too"
    assert not any(row["stopped"] for row in rows[:-1])
    assert [path.name for path in job.best_checkpoint.glob("step-*")] == [f"step-{best:06d}"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    kept = read_json(job.kept_step_file)
    assert kept is not None
    assert kept["step"] == best
    assert "No measured step met the budgets" in kept["why"]
    best_weights = load_file(job.best_checkpoint / f"step-{best:06d}" / "weights.safetensors")
    student = load_model(tmp_path / "student", "float32").state_dict()
    assert len(best_weights) > 5
    for name, weight in best_weights.items():
        assert torch.equal(weight, student[name]), "the weights of the last step are not shipped"
