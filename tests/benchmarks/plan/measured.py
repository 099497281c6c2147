"""Real engines and a real optimizer step on this machine, each in a process of its own, beside the formulas.

Everything runs on one thread and is timed in processor time, the hardware entry too, so that neighbours count little.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomplete.engines.spec import EngineSpec
from raycomplete.plan.catalogue import Hardware, find_hardware
from raycomplete.plan.engines import engine_of, engine_s
from raycomplete.plan.trainer import train_parts, worker_memory
from raycomplete.plan.workload import Sequences
from tests.benchmarks.plan.cases import CASES, Case
from tests.benchmarks.plan.cpu import measured_cpu
from tests.benchmarks.plan.points import Point
from tests.benchmarks.plan.student import random_tokens, student_and_batches

_TIMEOUT_S = 600.0
_REPEATS = 3


def measured_points(case: Case, *, engines: bool) -> list[Point]:
    """The optimizer step and its memory, and with `engines` also scoring and rollouts in vLLM and DeepSpeed's step."""
    context = multiprocessing.get_context("spawn")
    points: list[Point] = []
    for work in (step_points, _scoring, _rollouts, _training) if engines else (step_points,):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            points += pool.submit(work, case).result(_TIMEOUT_S)
    return points


def _scoring(case: Case) -> list[Point]:
    spec = EngineSpec(str(case.path), case.config.models.dtype, 512, threads=1)
    os.environ |= spec.environment()
    from raycomplete.engines.score_cache import ScoreRequest
    from raycomplete.engines.scoring_engine import PoolingEngine

    engine = PoolingEngine(spec)
    rng = np.random.default_rng(0)
    groups = case.request(find_hardware("cpu")).workload(1).scored["aligned"]
    rounds = iter([_requests(case, groups, rng, ScoreRequest) for _ in range(_REPEATS + 1)])
    seconds, hardware = timed(lambda: engine.hidden_states(next(rounds)))
    inside = replace(hardware, object_store_bandwidth=float("inf"))
    expected = engine_of(case.request(inside), "aligned", 1).scoring_s(groups)
    tokens = sum(item.tokens for item in groups)
    return [Point(f"{case.name}, scoring", "tok/s", tokens / expected, tokens / seconds)]


def _requests(case: Case, groups: Sequence[Sequences], rng: Any, kind: Callable[..., Any]) -> list[Any]:
    made = []
    for group in groups:
        for _ in range(int(group.count)):
            tokens = random_tokens(rng, int(group.prompt + group.response))
            made.append(kind(tokens, int(group.prompt)))
    return made


def _rollouts(case: Case) -> list[Point]:
    spec = EngineSpec(str(case.path), case.config.models.dtype, 512, threads=1)
    os.environ |= spec.environment()
    from raycomplete.engines.rollout_worker import RolloutEngine, Sampling

    engine = RolloutEngine(spec)
    rng = np.random.default_rng(0)
    rollouts = case.request(find_hardware("cpu")).workload(1).rollouts
    assert rollouts is not None
    written: list[int] = []

    def once() -> None:
        sequences = [random_tokens(rng, int(rollouts.prompt)) for _ in range(int(rollouts.count))]
        done = engine.generate_finished(sequences, Sampling(int(rollouts.response), 1.0))
        written.append(max(len(ids) for ids, _ in done))

    seconds, hardware = timed(once)
    expected = engine_s(case.request(hardware), "rollout", 1, 1)
    # Some responses end early: the passes that were made are those of the longest.
    passes = float(np.median(written))
    return [
        Point(
            f"{case.name}, rollouts", "ms a decoding step", 1e3 * expected / rollouts.response, 1e3 * seconds / passes
        )
    ]


def step_points(case: Case) -> list[Point]:
    """Forward and backward of the student with its loss, AdamW beside it, and the memory of both, without DeepSpeed."""
    torch.set_num_threads(1)
    micro_batches = case.request(find_hardware("cpu")).workload(1).micro_batches
    student_and_batches(case, micro_batches)[0].float()  # libraries are imported, and are no memory of the worker
    _give_back()
    before = _resident("VmRSS")
    module, batches = student_and_batches(case, micro_batches)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().requires_grad_() for parameter in trained]
    same = case.dtype == "float32"
    optimizer = torch.optim.AdamW(trained if same else masters, foreach=False)

    def passes() -> None:
        for batch in batches:
            module(batch, "loss")[0].backward()

    def update() -> None:
        if not same:
            for master, parameter in zip(masters, trained, strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
        torch.nn.utils.clip_grad_norm_(trained if same else masters, 1.0)
        optimizer.step()

    passes()
    update()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on VmHWM counts anew
    passes()
    update()
    peak = _resident("VmHWM") - before
    seconds, hardware = timed(passes)
    request = case.request(hardware)
    parts, memory = train_parts(request, 1), worker_memory(request, 1)
    memory.pop("process", None)  # it was there before
    update_s, hardware = timed(update)
    updated = train_parts(case.request(hardware), 1)["optimizer"]
    fitted = case.name == CASES[0].name  # two constants of the formulas come from the first
    return [
        Point(
            f"{case.name}, forward, loss and backward",
            "s",
            parts["forward and backward"] + parts["loss"],
            seconds,
            fitted,
        ),
        Point(f"{case.name}, AdamW and clipping", "ms", updated * 1e3, update_s * 1e3, fitted),
        Point(f"{case.name}, memory of the worker", "MiB", sum(memory.values()) / 2**20, peak / 2**20),
    ]


def _training(case: Case) -> list[Point]:
    """The whole optimizer step under DeepSpeed."""
    torch.set_num_threads(1)
    from raycomplete.training.deepspeed_engine import start_engine

    work, config = case.request(find_hardware("cpu")).workload(1), case.config
    _start_process_group()
    module, batches = student_and_batches(case, work.micro_batches)
    train = config.train.model_copy(update={"steps": 100, "lr": 1e-5})
    engine = start_engine(module, train, config.models.dtype, train.per_device_batch_size, work.micro_batches)

    def step() -> None:
        for batch in batches:
            output = engine(batch, "loss")
            engine.backward(output[0])
            engine.step()

    seconds, hardware = timed(step)
    expected = sum(train_parts(case.request(hardware), 1).values())
    return [Point(f"{case.name}, optimizer step under DeepSpeed", "s", expected, seconds)]


def _start_process_group() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)


def timed(work: Callable[[], object]) -> tuple[float, Hardware]:
    """Median processor seconds of a call after one warm-up, and the mean of the hardware before and after."""
    work()
    first = measured_cpu(time.process_time)
    seconds = []
    for _ in range(_REPEATS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    last = measured_cpu(time.process_time)
    names = ("bfloat16_flops", "float32_flops", "memory_bandwidth", "copy_bandwidth", "call_s", "softmax_per_s")
    mean: dict[str, Any] = {name: (getattr(first, name) + getattr(last, name)) / 2 for name in names}
    return float(np.median(seconds)), replace(first, **mean)


def _give_back() -> None:
    """Freed memory goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
