"""Weights that are sent from the trainer to engines: which then speak as transformers, or are told apart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from raycomplete.data.checkpoints import load_model
from raycomplete.engines import rollout_worker
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutWorker
from raycomplete.engines.weight_transfer import (
    CARRIERS,
    Carrier,
    EnginePlace,
    WeightTransfer,
)
from raycomplete.engines.weights import WeightsLostError
from raycomplete.runtime.errors import WaitTimeoutError, WorkError
from tests.engines.file_transfer import FileCarrier, file_pool
from tests.engines.tiny import log_probs_of, make_model, options, random_probe, state_of


class Handle:
    """Stands for an actor's handle: its answer to each step of a transfer is what is given, or nothing wrong."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []
        place = answers.get("place")
        self.place = SimpleNamespace(remote=lambda: place or ray.put(EnginePlace("first", ("cpu",))))
        self.take_step = SimpleNamespace(remote=self._take_step)

    def _take_step(self, incarnation: str, step: str, *arguments: Any) -> Any:
        assert incarnation == "first"
        self.asked.append(step)
        return self.answers.get(step) or ray.put(None)


class Recorder(RolloutPool):
    """Engines that are noted instead of started again."""

    restarted: tuple[int, ...] = ()

    def restart(self, engines: Any) -> None:
        self.restarted = tuple(engines)


class Silent(Carrier):
    """Carries nothing; its own part of a send ends when it is closed."""

    is_closed = False

    def infos(self, places: Any) -> list[dict[str, Any]]:
        return [{} for _ in places]

    def send(self, tensors: Any, dtype: torch.dtype, update: Any) -> None:
        def wait() -> None:
            while not self.is_closed:
                time.sleep(0.01)

        update({}, wait)

    def close(self) -> None:
        self.is_closed = True


def pool_of(*handles: Handle) -> Recorder:
    given = options()
    return Recorder(handles, "/nowhere", replace(given, spec=replace(given.spec, weight_transfer="file")))


@pytest.fixture
def never(ray_cluster: None) -> Iterator[Any]:
    reference = ray.remote(lambda: time.sleep(600)).options(num_cpus=0).remote()
    yield reference
    ray.cancel(reference, force=True)


@pytest.fixture
def failed(ray_cluster: None) -> Any:
    def fail() -> None:
        raise WorkError("No room for weights.")

    return ray.remote(fail).options(num_cpus=0, max_retries=0).remote()


@pytest.mark.slow
def test_who_does_not_join_is_named_and_started_again(never: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARRIERS, "file", Silent)
    monkeypatch.setattr("raycomplete.engines.weight_transfer.SYNC_TIMEOUT_S", 4.0)
    pool = pool_of(Handle(), Handle(connect=never))
    with pytest.raises(
        WaitTimeoutError, match=r"After 4 s these have not joined the transfer of weights: rollout engine 2 of 2\."
    ):
        WeightTransfer(pool)
    assert pool.restarted == (1,)
    stuck = pool_of(Handle(place=never))  # in a send of a trainer that is gone
    with pytest.raises(WaitTimeoutError, match=r"these have not told their devices: rollout engine\."):
        WeightTransfer(stuck)
    assert stuck.restarted == (0,)


@pytest.mark.slow
def test_an_error_of_one_engine_ends_the_wait_for_the_others(
    never: Any, failed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CARRIERS, "file", Silent)
    handles = Handle(receive=never), Handle(receive=failed)
    pool = pool_of(*handles)
    transfer = WeightTransfer(pool)
    with pytest.raises(WorkError, match="No room for weights"):
        transfer.send({"a": torch.zeros(2)}, 3)
    assert pool.restarted == (0,)
    assert transfer._carrier.is_closed  # type: ignore[attr-defined]
    assert handles[1].asked == ["connect", "begin_update", "receive"]


def test_a_step_that_ray_repeats_in_another_process_is_refused() -> None:
    worker = RolloutWorker(options(Path("model")))
    done: list[str] = []
    engine: Any = SimpleNamespace(receive=done.append, is_whole=True, shut_down=lambda: done.append("shut down"))
    worker._engine = engine
    worker.take_step(worker._incarnation, "receive", "chunk")
    with pytest.raises(WeightsLostError):
        worker.take_step("another", "receive", "chunk")
    assert done == ["chunk"]


def test_an_engine_whose_trainer_left_in_the_middle_of_a_send_gives_way_to_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = RolloutWorker(options(Path("model")))
    done: list[str] = []
    old: Any = SimpleNamespace(is_whole=False, shut_down=lambda: done.append("shut down"))
    new: Any = SimpleNamespace(is_whole=True, load=lambda weights, timeout_s: False, version=None)
    new.log_probs = lambda sequences: "new"
    monkeypatch.setattr(rollout_worker, "RolloutEngine", lambda spec, stop_ids: new)
    worker._engine = old
    assert worker.log_probs("model", []).value == "new"
    assert done == ["shut down"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    for seed in (0, 1):
        make_model(folder / str(seed), seed, tied=True, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def pool(ray_cluster: None, folder: Path) -> Iterator[RolloutPool]:
    given = options(folder / "0", "bfloat16")
    with file_pool(replace(given, spec=replace(given.spec, weight_transfer="file"))) as pool:
        yield pool


@pytest.fixture
def transfer(pool: RolloutPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightTransfer:
    monkeypatch.setitem(CARRIERS, "file", partial(FileCarrier, tmp_path))
    return WeightTransfer(pool)


def speaks(pool: RolloutPool, weights: Any, path: Path) -> bool:
    probe = random_probe(0)
    report = pool.sync(weights, probe, log_probs_of(load_model(path, "bfloat16"), probe))
    return report.mean_abs_difference < 0.03 and report.load_s == 0 and report.transfer == "file"


@pytest.mark.slow
def test_after_each_send_the_engine_speaks_as_transformers_does(
    pool: RolloutPool, transfer: WeightTransfer, folder: Path
) -> None:
    """The head is tied, so one that is packed from an embedding before would be a nat off."""
    sampled: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": 3}
    answers = []
    for version, seed in enumerate((1, 0, 1), start=1):
        sent = transfer.send(state_of(folder / str(seed), "float32"), version)
        assert speaks(pool, sent, folder / str(seed))
        call = pool.submit([[7, 8, 9] * 8] * 3, weights=sent, **sampled)  # longer than a block that is cached
        answers.append(pool.collect(call))
        assert call.version == version
    assert answers[0] == answers[2] != answers[1]
    assert sent.num_bytes == sum(2 * tensor.numel() for tensor in state_of(folder / "1", "bfloat16").values())


@pytest.mark.slow
def test_sends_of_one_version_are_told_apart(pool: RolloutPool, transfer: WeightTransfer, folder: Path) -> None:
    state = state_of(folder / "1", "bfloat16")
    first, second = transfer.send(state, 5), transfer.send(state, 5)
    assert speaks(pool, second, folder / "1")
    with pytest.raises(WeightsLostError, match=r"weights of version 5 were sent by file and are no longer"):
        pool.collect(pool.submit([[7, 8, 9]], weights=first, max_tokens=2))
    assert speaks(pool, second, folder / "1"), "to be asked for others has not changed it"
    packed = pool.pack(state_of(folder / "0", "bfloat16"), 6)
    probe = random_probe(0)
    report = pool.sync(packed, probe, log_probs_of(load_model(folder / "0", "bfloat16"), probe))
    assert report.transfer == "store"
    with pytest.raises(WeightsLostError):
        speaks(pool, second, folder / "1")


@pytest.mark.slow
def test_a_receive_that_fails_leaves_no_mixture(pool: RolloutPool, transfer: WeightTransfer, folder: Path) -> None:
    state = state_of(folder / "1", "bfloat16")
    with pytest.raises(WorkError, match="rollout engine failed"):
        transfer.send(state | {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 5)}, 8)
    assert transfer._carrier.is_closed  # type: ignore[attr-defined]
    probe = random_probe(0)
    packed = pool.pack(state, 8)
    report = pool.sync(packed, probe, log_probs_of(load_model(folder / "1", "bfloat16"), probe))
    assert report.mean_abs_difference < 0.03
    with pytest.raises(WorkError):
        transfer.send(state, 9)  # the new engine has joined nothing
    assert speaks(pool, WeightTransfer(pool).send(state, 9), folder / "1"), "until it is asked to"


@pytest.mark.slow
def test_an_engine_that_died_does_not_answer_with_other_weights(
    pool: RolloutPool, transfer: WeightTransfer, folder: Path
) -> None:
    sent = transfer.send(state_of(folder / "1", "bfloat16"), 10)
    process = ray.get(pool._actors[0].__ray_call__.remote(lambda worker: os.getpid()), timeout=60)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(WeightsLostError, match="version 10"):
        pool.collect(pool.submit([[7, 8, 9]], weights=sent, max_tokens=2))
    with pytest.raises(WeightsLostError, match="started again"):
        transfer.send(state_of(folder / "1", "bfloat16"), 11)
    again = WeightTransfer(pool).send(state_of(folder / "1", "bfloat16"), 11)
    assert speaks(pool, again, folder / "1")
