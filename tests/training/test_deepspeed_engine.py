"""NaN in a step: nothing changes, it is counted and kept, and too many in a row end training. Real DeepSpeed runs."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from raycomplete.config import Dtype, TrainConfig
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.runtime.errors import NotFiniteError
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.deepspeed_engine import _settings, spread_bad_loss, start_engine
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit
from tests.training.tiny import LocalScores, make_job

# Workers, ZeRO stage, dtype. A run takes most of a minute: one always, the others in `make test-all`.
ALL: list[tuple[int, int, Dtype]] = [(2, 3, "float32"), (1, 0, "float32"), (2, 2, "float32"), (1, 0, "bfloat16")]
# Counters that a step moves whether it changes the weights or not.
COUNTERS = {"global_steps", "global_samples", "skipped_steps", "overflow", "micro_steps"}


class NanScores(LocalScores):
    """Rank 0 reads NaN of one sequence in some steps (counted from 1); all states come in the student's dtype.

    The other rank's loss is finite then, and it must leave the step out all the same.
    """

    def __init__(self, path: Path, dtype: torch.dtype, steps: set[int]) -> None:
        super().__init__(path)
        self.dtype, self.steps, self.asked = dtype, steps, 0

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        self.asked += 1
        states = [state.to(self.dtype) for state in super().collect_tensors(reference)]
        if self.asked in self.steps and dist.get_rank() == 0:
            states[0] = torch.full_like(states[0], torch.nan)
        return states


def make(folder: Path, dtype: Dtype, bad: set[int], **changes: Any) -> TrainJob:
    train = TrainConfig(
        steps=7,
        lr=1e-2,
        warmup_steps=1,
        per_device_batch_size=2,  # several micro-batches a step: only one of them is bad
        checkpoint_every=1,
        keep_checkpoints=9,
        **changes,
    )
    job = make_job(folder, train)
    nan_steps = {"aligned": bad, "base": set[int]()}
    sources = {role: NanScores(folder / role, TORCH_DTYPES[dtype], steps) for role, steps in nan_steps.items()}
    return replace(job, dtype=dtype, scorers=sources)


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values in a checkpoint, one by one, counters left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in COUNTERS:
                yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    elif isinstance(value, torch.Tensor | int | float | str | bool | None):
        yield name, value


def state_of(job: TrainJob, step: int) -> dict[str, Any]:
    """Weights, moments, master weights and schedule after a step, of all ranks."""
    folder = job.checkpoints / f"step-{step:06d}"
    files = sorted(folder.rglob("*.pt"))
    assert files
    return dict(
        leaf for file in files for leaf in leaves(torch.load(file, weights_only=False), str(file.relative_to(folder)))
    )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [
        name
        for name, value in before.items()
        if not (torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name])
    ]


@pytest.mark.parametrize(("warmup_steps", "rates"), [(0, [1.0, 1.0, 1.0]), (3, [0.25, 0.5, 0.75])])
def test_the_rate_rises_over_as_many_steps_as_asked(warmup_steps: int, rates: list[float]) -> None:
    """DeepSpeed's own schedule takes no fewer than two."""
    train = TrainConfig(steps=100, lr=0.5, warmup_steps=warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    for group in optimizer.param_groups:
        group["lr"] = train.lr
    schedule = WarmupCosineLR(optimizer, **_settings(train, "float32", 1, 1)["scheduler"]["params"])
    found = []
    for step in range(3):
        schedule.step(step)
        found.append(schedule.get_last_lr()[0] / train.lr)
    assert found == pytest.approx(rates, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "zero_stage", "dtype"),
    [ALL[0], *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ALL[1:])],
)
def test_a_bad_step_changes_nothing(
    ray_cluster: None, num_workers: int, zero_stage: int, dtype: Dtype, tmp_path: Path
) -> None:
    job = make(tmp_path, dtype, {2, 4, 5, 6}, num_workers=num_workers, zero_stage=zero_stage)
    with pytest.raises(NotFiniteError, match="in 3 steps in a row, up to step 6"):
        fit(job, cpus_per_worker=0.5, gpus_per_worker=0)

    rows = read_metrics(job.metrics_file)
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 2, 3]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, True]
    first, bad, good = (state_of(job, step) for step in (1, 2, 3))
    assert any("exp_avg" in name for name in first)
    assert differences(first, bad) == []
    changed = differences(bad, good)
    assert any("exp_avg" in name for name in changed), "the next step trains as if nothing had been"
    assert all(value.isfinite().all() for value in good.values() if isinstance(value, torch.Tensor))

    kept = sorted(path.name for path in tmp_path.glob("bad-step-*.json"))
    assert kept == [f"bad-step-{step:06d}.json" for step in (2, 4, 5, 6)]
    path = tmp_path / kept[-1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    batches = [batch for rank in json.loads(path.read_text())["ranks"] for batch in rank]
    assert len(batches) == 4
    assert any(batch["loss"] is None for batch in batches)
    assert any(batch["loss"] is not None for batch in batches)
    rows_of_losses = [row for batch in batches for row in batch["rows"]]
    assert {row["term"] for row in rows_of_losses} == {"anchor", "recovery", "push_forward", "opening"}
    assert {row["loss"] is None for row in rows_of_losses} == {True, False}
    places = [{(row["sequence"], row["row"]) for row in batch["rows"]} for batch in batches]
    assert all(len(found) == len({sequence for sequence, _ in found}) for found in places), "each stands in one row"
    assert any(len(found) > len({row for _, row in found}) for found in places), "several share a packed row"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights_after_steps(zero_stage: int, dtype: Dtype, *, reduces: bool) -> tuple[torch.Tensor, bool]:
    """Weights after three steps of two passes each, and whether the engine would have reduced gradients by itself."""
    torch.manual_seed(0)
    module = torch.nn.Linear(7, 5).to(TORCH_DTYPES[dtype])
    train = TrainConfig(steps=3, lr=0.1, warmup_steps=1, zero_stage=zero_stage)
    engine = start_engine(module, train, dtype, 2, 2)
    by_itself = bool(engine.enable_backward_allreduce)
    engine.enable_backward_allreduce = by_itself or reduces
    for _ in range(6):
        engine.backward(engine(torch.randn(2, 7, dtype=TORCH_DTYPES[dtype])).float().square().mean())
        engine.step()
    return module.weight.detach().clone(), by_itself


@pytest.mark.usefixtures("alone")
def test_a_worker_alone_does_not_copy_its_gradients() -> None:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        left_out, by_itself = weights_after_steps(0, dtype, reduces=False)
        assert not by_itself
        # The reduction of bfloat16 weights rounds their float32 gradients.
        torch.testing.assert_close(
            left_out, weights_after_steps(0, dtype, reduces=True)[0], rtol=0 if dtype == "float32" else 2**-6, atol=0
        )
    assert weights_after_steps(2, "float32", reduces=True)[1]  # there the reduction cuts gradients into shards


@pytest.mark.parametrize(("value", "is_bad"), [(1.5, False), (float("nan"), True), (float("inf"), True)])
def test_a_bad_loss_shows_in_every_gradient(value: float, is_bad: bool) -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = weight.sum() + torch.tensor(value)  # its own gradient is finite
    spread_bad_loss(loss).backward()
    assert weight.grad is not None
    if is_bad:
        assert weight.grad.isnan().all()
    else:
        assert weight.grad.tolist() == [1.0, 1.0]
