"""Real Ray Train + DeepSpeed runs: the same loss for every ZeRO stage and number of workers, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import read_samples
from raycomplete.methods.completion import FirstTokensConfig
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.step_plan import Planner
from raycomplete.training.trainer import fit
from tests.training.tiny import build_batch, completion, make_job, plain_loss, prefetcher_of

pytestmark = pytest.mark.slow

STEPS = 4
METHOD = completion(first_tokens=FirstTokensConfig(count=2, weight=3.0))


def settings(*, num_workers: int, zero_stage: int, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 1,
        "num_workers": num_workers,
        "zero_stage": zero_stage,
        "per_device_batch_size": 2,
        "loss_chunk_tokens": 16,
        "checkpoint_every": 2,
        "stall_timeout_s": 240.0,
    }
    return TrainConfig(**(values | changes))


def run(folder: Path, train: TrainConfig, **options: Any) -> list[dict[str, Any]]:
    job = make_job(folder, train, METHOD, **options)
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    return read_metrics(job.metrics_file)


def reference_first_loss(folder: Path, train: TrainConfig) -> dict[str, float]:
    """The loss of step 1 in float64."""
    job = make_job(folder, train, METHOD)
    samples = read_samples(job.samples)
    planner = Planner(samples, anchor_batch_size=4, recovery_batch_size=4, seed=train.seed)
    plan = planner.plan(0, DepthSampler(METHOD.depth, train.seed))
    prefetcher = prefetcher_of(METHOD, job.scorers)
    prefetcher.request(0, *planner.samples_of(0))
    _, output = plain_loss(job, build_batch(METHOD, plan, prefetcher.take(0)), METHOD.loss(train))
    return {"loss": float(output.total.detach()), "anchor": float(output.losses["anchor"])}


@pytest.fixture(scope="module")
def single(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One worker, no sharding: what the other runs must reproduce."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run(folder, settings(num_workers=1, zero_stage=0))


def test_the_first_loss_is_the_float64_reference(single: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    expected = reference_first_loss(tmp_path, settings(num_workers=1, zero_stage=0))
    for name, value in expected.items():
        assert single[1][0][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("zero_stage", "tied"),
    [(3, True), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(2, True), (3, False)])],
)
def test_sharded_runs_on_two_workers_reproduce_the_loss(
    single: tuple[Path, list[dict[str, Any]]], zero_stage: int, tied: bool, tmp_path: Path
) -> None:
    rows = run(tmp_path, settings(num_workers=2, zero_stage=zero_stage), tied=tied)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if tied:  # an untied model is another model: it is compared with its own export only
        for row, expected in zip(rows, single[1], strict=True):
            for name in ("loss", "anchor", "recovery", "push_forward"):
                assert row[name] == pytest.approx(expected[name], rel=2e-4), (row["step"], name)
    assert rows[-1]["loss"] < rows[0]["loss"]
    student = load_model(tmp_path / "student", "float32")
    start = load_model(tmp_path / "base", "float32")
    moved = [not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    assert (student.lm_head.weight is student.base_model.embed_tokens.weight) == tied
    profile = json.loads((tmp_path / "profile.json").read_text())
    # The student of this test starts as base and is pulled to aligned, which the profile must tell apart.
    assert min(profile["aligned"]["kl_to_base"]) > max(profile["student"]["kl_to_base"]) > 0.01


def test_a_resumed_run_continues_as_if_it_had_never_stopped(
    single: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, uninterrupted = single
    for name in ("base", "aligned", "checkpoints"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "metrics.jsonl", tmp_path / "metrics.jsonl")
    # As after a kill in step 4: the last whole checkpoint is that of step 2, and metrics.jsonl is ahead of it.
    (tmp_path / "checkpoints" / "step-000004" / "complete.json").unlink()
    rows = run(tmp_path, settings(num_workers=1, zero_stage=0))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, uninterrupted, strict=True):
        assert {name: row[name] for name in ("loss", "lr", "depth_mean")} == {
            name: expected[name] for name in ("loss", "lr", "depth_mean")
        }
    first, second = (load_model(path / "student", "float32").state_dict() for path in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.exhaustive), 4])
def test_sft_learns_the_answers(ray_cluster: None, lora_rank: int, tmp_path: Path) -> None:
    train = settings(num_workers=1, zero_stage=0, steps=12, checkpoint_every=12, lora_rank=lora_rank)
    job = make_job(tmp_path, train, SFT(anchor_batch_size=4))
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
    rows = read_metrics(job.metrics_file)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert all(row["nll"] == row["loss"] for row in rows)
    assert "anchor" not in rows[0]
    assert "depth_loss" not in rows[0]
    # What was exported is what was trained: it has the loss of the end, not of the start.
    assert mean_loss(job.output, job.samples) < 0.95 * mean_loss(job.start, job.samples)


def mean_loss(checkpoint: Path, samples: Path) -> float:
    model = load_model(checkpoint, "float32")
    losses = []
    for sample in read_samples(samples).anchor:
        tokens = torch.tensor([sample.prompt_ids + sample.answer_ids])
        with torch.no_grad():
            logits_TV = model(tokens).logits[0, len(sample.prompt_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(sample.answer_ids)))
    return float(torch.stack(losses).mean())


def test_a_failing_worker_is_reported_in_one_sentence(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, settings(num_workers=1, zero_stage=0))
    (tmp_path / "aligned" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WorkError, match=r"training worker 0 failed after 0 finished steps .* resume with --resume"):
        fit(job, cpus_per_worker=0.5, gpus_per_worker=0)
