"""Real Ray Train + DeepSpeed runs: the same loss for every ZeRO stage and number of workers, weights in step with the
engines, resume, early stopping, kills, a full disk and requests to stop."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycomplete.config import RolloutConfig, TrainConfig, ValidationConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import read_samples
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import DiskFullError, ProcessDiedError, StoppedError, WorkError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.job import TrainJob
from raycomplete.training.step_plan import DepthSampler, Planner
from raycomplete.training.trainer import fit
from tests.training.tiny import (
    CountedDepths,
    LocalScores,
    LocalStudentEngines,
    build_batch,
    completion,
    make_job,
    plain_loss,
    prefetcher_of,
    steered,
)

pytestmark = pytest.mark.slow

STEPS = 4
METHOD = completion(first_token_weight=3.0)
BY_COMPLIANCE = completion(depth=CountedDepths(min=1, max=8))
# The anchor's weight moves at every measurement: the tiny student starts nats away from its teacher.
STEERED = ValidationConfig(every=1, depths=[0, 4], max_tokens=6, kl_budget=0.5)
ROLLOUT = RolloutConfig(on_policy=True, max_student_tokens=4, max_refusal_tokens=4, sync_every=2)
Single = tuple[Path, list[dict[str, Any]]]


def settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 1,
        "per_device_batch_size": 2,
        "checkpoint_every": 2,
    }
    return TrainConfig(**(values | changes))


def on_policy(folder: Path, rollout: RolloutConfig = ROLLOUT, *, model: Any = None, **changes: Any) -> TrainJob:
    train = settings(**{"validation": STEERED} | changes)
    job = steered(make_job(folder, train, BY_COMPLIANCE, **model or {}))
    student_engines = LocalStudentEngines(job.start, rollout.max_student_tokens)
    return replace(job, rollout=rollout, student_engines=student_engines)


def run(job: TrainJob, **options: Any) -> list[dict[str, Any]]:
    fit(job, cpus_per_worker=0.5, gpus_per_worker=0, **options)
    return read_metrics(job.metrics_file)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(folder, "float32").state_dict()
    return state


@pytest.fixture(scope="module")
def single(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Single:
    """One worker, no sharding: what the other runs must reproduce."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run(make_job(folder, settings(), METHOD))


@pytest.fixture(scope="module")
def single_on_policy(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Single:
    folder = tmp_path_factory.mktemp("on-policy")
    return folder, run(on_policy(folder))


def test_the_first_loss_is_the_float64_reference(single: Single, tmp_path: Path) -> None:
    job = make_job(tmp_path, settings(), METHOD)
    planner = Planner(read_samples(job.samples), anchor_batch_size=4, recovery_batch_size=4, seed=0)
    prefetcher = prefetcher_of(METHOD, job.scorers)
    prefetcher.request(0, *planner.samples_of(0))
    batch = build_batch(METHOD, planner.plan(0, DepthSampler(METHOD.depth, 0)), prefetcher.take(0))
    _, output = plain_loss(job, batch, METHOD.loss())
    assert single[1][0]["loss"] == pytest.approx(float(output.total.detach()), rel=1e-5)
    assert single[1][0]["anchor"] == pytest.approx(float(output.losses["anchor"]), rel=1e-5)


@pytest.mark.parametrize(
    ("zero_stage", "tied"),
    [(3, True), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(2, True), (3, False)])],
)
def test_sharded_runs_on_two_workers_reproduce_the_loss(
    single: Single, zero_stage: int, tied: bool, tmp_path: Path
) -> None:
    rows = run(make_job(tmp_path, settings(num_workers=2, zero_stage=zero_stage), METHOD, tied=tied))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if tied:  # an untied model is another model: it is compared with its own export only
        for row, expected in zip(rows, single[1], strict=True):
            for name in ("loss", "anchor", "recovery", "push_forward"):
                assert row[name] == pytest.approx(expected[name], rel=2e-4), (row["step"], name)
    assert rows[-1]["loss"] < rows[0]["loss"]
    student, start = (load_model(tmp_path / name, "float32") for name in ("student", "base"))
    assert all(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    assert (student.lm_head.weight is student.base_model.embed_tokens.weight) == tied
    profile = json.loads((tmp_path / "profile.json").read_text())
    # The student of this test starts as base and is pulled to aligned, which the profile must tell apart.
    assert min(profile["aligned"]["kl_to_base"]) > max(profile["student"]["kl_to_base"]) > 0.01


@pytest.mark.parametrize("rolled_out", [False, True])
def test_a_resumed_run_continues_as_if_it_had_never_stopped(
    single: Single, single_on_policy: Single, rolled_out: bool, tmp_path: Path
) -> None:
    """As after a kill in step 4: the last whole checkpoint is that of step 2, and metrics.jsonl is ahead of it."""
    folder, uninterrupted = single_on_policy if rolled_out else single
    for name in ("base", "aligned", "checkpoints", *(["best"] if rolled_out else [])):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "metrics.jsonl", tmp_path / "metrics.jsonl")
    (tmp_path / "checkpoints" / "step-000004" / "complete.json").unlink()
    rows = run(on_policy(tmp_path) if rolled_out else make_job(tmp_path, settings(), METHOD))
    names = ["step", "loss", "lr", "depth_mean", "depth_probabilities"]
    names += ["staleness", "rollout_tokens", "anchor_weight", "validation"] if rolled_out else []
    for row, expected in zip(rows, uninterrupted, strict=True):
        assert {name: row[name] for name in names} == {name: expected[name] for name in names}
    first, second = weights(folder / "student"), weights(tmp_path / "student")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rollouts_are_as_fresh_as_the_run_file_says(single_on_policy: Single) -> None:
    """Weights go out before steps 1 and 3 (of 4); each batch is rolled out one step ahead."""
    rows = single_on_policy[1]
    assert [row.get("sync", {}).get("version") for row in rows] == [0, None, 2, None]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 1]
    assert all(row["compliance"] == 0.5 for row in rows)
    assert all(row["rollout_tokens"] > 0 for row in rows)
    assert rows[-1]["anchor_weight"] != rows[0]["anchor_weight"]


@pytest.mark.parametrize("sends_until", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_sharded_weights_reach_the_engines_and_the_loss_is_the_same(
    single_on_policy: Single, sends_until: int, tmp_path: Path
) -> None:
    """`LocalStudentEngines` compares its log-probabilities with the trainer's at every update."""
    job = on_policy(tmp_path, num_workers=2, zero_stage=3)
    rows = run(replace(job, student_engines=LocalStudentEngines(job.start, ROLLOUT.max_student_tokens, sends_until)))
    sent = "nccl" if sends_until else "store"
    assert [row["sync"]["transfer"] for row in rows if "sync" in row] == [sent, "store"]
    for row, expected in zip(rows, single_on_policy[1], strict=True):
        for name in ("loss", "anchor", "recovery", "push_forward", "anchor_weight"):
            assert row[name] == pytest.approx(expected[name], rel=5e-4), (row["step"], name)
        found, wanted = row["validation"], expected["validation"]
        for name in ("compliance", "over_refusal", "meets_budgets", "best_step"):
            assert found[name] == wanted[name], (row["step"], name)
        assert found["kl"] == pytest.approx(wanted["kl"], rel=5e-4)
    second = weights(tmp_path / "student")
    for name, weight in weights(single_on_policy[0] / "student").items():
        torch.testing.assert_close(second[name], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"lora_rank": 4}),
        pytest.param("qwen3_moe", {"num_workers": 2, "zero_stage": 3}, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_moe", {"lora_rank": 4}, marks=pytest.mark.exhaustive),
        ("mixtral", {}),
    ],
)
def test_adapters_and_experts_reach_the_engines_by_the_names_of_their_files(
    ray_cluster: None, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    rollout = ROLLOUT.model_copy(update={"sync_every": 1})
    rows = run(on_policy(tmp_path, rollout, model={"kind": kind}, steps=2, **changes))
    assert [(row["sync"]["version"], row["staleness"]) for row in rows] == [(0, 0), (1, 1)]
    start, student = (
        {name: tensor for file in (tmp_path / role).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for role in ("base", "student")
    )
    assert start.keys() == student.keys()
    changed = {name for name in start if not torch.equal(start[name], student[name])}
    if "lora_rank" not in changes:
        assert changed == start.keys()
        return
    assert changed
    part = "_proj" if kind == "llama" else ".self_attn."  # neither router nor experts have adapters
    assert all(part in name for name in changed)


def test_training_stops_where_no_measurement_is_better_and_the_best_step_is_kept(
    ray_cluster: None, tmp_path: Path
) -> None:
    validation = STEERED.model_copy(update={"patience": 2})
    train = settings(steps=12, lr=0.3, checkpoint_every=6, validation=validation, sinks=["tensorboard"])
    job = steered(make_job(tmp_path, train, BY_COMPLIANCE))
    rows = run(job)
    best = rows[-1]["validation"]["best_step"]
    assert len(rows) == best + 2 < 12, "two measurements without a better one"
    assert [row["stopped"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert (job.checkpoints / f"step-{len(rows):06d}").is_dir(), "what follows the last step may be killed, too"
    assert [path.name for path in job.best_checkpoint.glob("step-*")] == [f"step-{best:06d}"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    kept = read_json(job.kept_step_file)
    assert kept is not None
    assert kept["step"] == best
    best_weights = load_file(job.best_checkpoint / f"step-{best:06d}" / "weights.safetensors")
    student = weights(tmp_path / "student")
    assert len(best_weights) > 5
    assert all(torch.equal(weight, student[name]) for name, weight in best_weights.items()), (
        "not those of the last step"
    )


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.exhaustive), 4])
def test_sft_learns_the_answers(ray_cluster: None, lora_rank: int, tmp_path: Path) -> None:
    train = settings(steps=12, checkpoint_every=12, lora_rank=lora_rank)
    job = make_job(tmp_path, train, SFT(anchor_batch_size=4))
    rows = run(job)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert all(row["nll"] == row["loss"] for row in rows)
    assert not {"anchor", "depth_loss"} & rows[0].keys()
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


def test_a_failing_worker_is_named(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, settings(), METHOD)
    (tmp_path / "aligned" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WorkError, match=r"training worker 0 failed"):
        run(job)


class DeadlyScores(LocalScores):
    """Kills the worker that asks for the n-th step of an attempt, as often as there are `lives`."""

    def __init__(self, path: Path, lives: Path, step: int) -> None:
        super().__init__(path)
        self.lives, self.step, self.asked = lives, step, 0

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        self.asked += 1
        lives = sorted(self.lives.iterdir())
        if self.asked == self.step and lives:
            with contextlib.suppress(FileNotFoundError):  # of two workers that come here, one dies
                lives[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().collect_tensors(reference)


class SlowScores(LocalScores):
    """Leaves time to ask for a stop."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        time.sleep(0.2)
        return super().collect_tensors(reference)


def deadly(job: TrainJob, lives: int, step: int) -> TrainJob:
    folder = job.folder / "lives"
    folder.mkdir()
    for number in range(lives):
        (folder / str(number)).touch()
    return replace(job, scorers={**job.scorers, "aligned": DeadlyScores(job.folder / "aligned", folder, step)})


def test_training_goes_on_after_a_worker_was_killed(ray_cluster: None, tmp_path: Path) -> None:
    """One of two workers is killed in step 4; the losses are those of a run that was left alone."""
    train = settings(steps=5, num_workers=2, zero_stage=2, max_failures=1)
    expected = run(make_job(tmp_path / "undisturbed", train))
    job = deadly(make_job(tmp_path / "killed", train), lives=1, step=4)
    shown: list[int] = []
    rows = run(job, on_step=lambda row: shown.append(row["step"]))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert shown[-3:] == [3, 4, 5], "the steps after the checkpoint of step 2 are made again"
    assert len(job.failures_file.read_text().splitlines()) == 1


@pytest.mark.exhaustive
def test_a_worker_that_dies_too_often_ends_the_run_with_its_facts(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ProcessDiedError) as caught:
        run(deadly(make_job(tmp_path, settings(steps=5, max_failures=1)), lives=2, step=3))
    stats = dict(caught.value.details())
    assert stats["who"] == "training worker 0"
    assert "killed by SIGKILL" in stats["likely cause"]
    assert stats["node"]
    assert Path(stats["log"]).exists()
    assert stats["kept"].startswith("the checkpoint of step 4 in ")


def test_a_stop_finishes_the_step_and_keeps_it(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, settings(num_workers=2, steps=60, checkpoint_every=50))
    job = replace(job, scorers={**job.scorers, "aligned": SlowScores(tmp_path / "aligned")})
    shown: list[int] = []
    with pytest.raises(StoppedError):
        run(job, on_step=lambda row: shown.append(row["step"]), stopping=lambda: len(shown) >= 2)
    done = len(read_metrics(job.metrics_file))
    assert 2 <= done < 60
    assert job.newest_checkpoint == done, "no finished step is lost"
    assert not job.stop_file.exists(), "nothing stops the run that goes on"
    assert not job.output.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs more rights than these tests have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.exhaustive
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(ray_cluster: None, small_disk: Path) -> None:
    job = make_job(small_disk, settings(num_workers=2, zero_stage=2, steps=12, checkpoint_every=1))
    job = replace(job, scorers={**job.scorers, "aligned": SlowScores(small_disk / "aligned")})
    filler = small_disk / "filler"

    def fill(row: dict[str, Any]) -> None:
        if row["step"] >= 2 and not filler.exists():
            with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(4096))

    with pytest.raises(DiskFullError):
        run(job, on_step=fill)
    there = sorted(path.name for path in job.checkpoints.iterdir())
    whole = sorted(path.parent.name for path in job.checkpoints.glob("*/complete.json"))
    assert whole
    assert there == whole, "what was half-written is removed"
    filler.unlink()
    assert len(run(job)) == 12
