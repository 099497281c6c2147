"""Real engines and a real optimizer step on this machine, each in a process of its own, beside the formulas.

The hardware entry is measured before and after in the same process, so that a busy machine slows both alike.
"""

from __future__ import annotations

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

from raycomplete.engine_options import available_cpus, engine_environment
from raycomplete.pipeline.plan_measure import measured_cpu
from raycomplete.plan.hardware import Hardware, find_hardware
from raycomplete.plan.request import engine_s, train_parts, worker_memory
from raycomplete.plan.speed import scoring_s
from raycomplete.plan.workload import Sequences
from tests.benchmarks.plan.cases import Case
from tests.benchmarks.plan.points import Point

_TIMEOUT_S = 600.0
_REPEATS = 3


def measured_points(case: Case) -> list[Point]:
    """Scoring, rollouts, the optimizer step and its memory."""
    context = multiprocessing.get_context("spawn")
    points: list[Point] = []
    for work in (_scoring, _rollouts, _training):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            points += pool.submit(work, case).result(_TIMEOUT_S)
    return points


def _scoring(case: Case) -> list[Point]:
    os.environ |= engine_environment(use_gpu=False)
    from raycomplete.scoring.engine import PoolingEngine
    from raycomplete.scoring.payload import ScoreRequest

    engine = PoolingEngine(str(case.path), dtype=case.config.models.dtype, max_length=512, use_gpu=False)
    rng = np.random.default_rng(0)
    groups = case.request(find_hardware("cpu")).workload(1).scored["aligned"]
    rounds = iter([_requests(case, groups, rng, ScoreRequest) for _ in range(_REPEATS + 1)])
    seconds, hardware = _timed(lambda: engine.hidden_states(next(rounds)))
    request = case.request(hardware)
    inside = replace(request.factors, object_store_bandwidth=float("inf"))
    expected = scoring_s(request.shapes["aligned"], hardware, inside, groups, dtype=case.config.models.dtype)
    tokens = sum(item.tokens for item in groups)
    return [Point(f"{case.name}, scoring", "tok/s", tokens / expected, tokens / seconds)]


def _requests(case: Case, groups: Sequence[Sequences], rng: Any, kind: Callable[..., Any]) -> list[Any]:
    made = []
    for group in groups:
        for _ in range(int(group.count)):
            tokens = _tokens(rng, int(group.prompt + group.response))
            made.append(kind(tokens, int(group.prompt)))
    return made


def _tokens(rng: Any, count: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(5, 200, count))


def _rollouts(case: Case) -> list[Point]:
    os.environ |= engine_environment(use_gpu=False)
    from raycomplete.rollout.engine import RolloutEngine

    engine = RolloutEngine(str(case.path), dtype=case.config.models.dtype, max_length=512, use_gpu=False)
    rng = np.random.default_rng(0)
    rollouts = case.request(find_hardware("cpu")).workload(1).rollouts
    assert rollouts is not None
    written: list[int] = []

    def once() -> None:
        sequences = [_tokens(rng, int(rollouts.prompt)) for _ in range(int(rollouts.count))]
        done = engine.generate_finished(sequences, int(rollouts.response), 1.0, 1.0, None)
        written.append(max(len(ids) for ids, _ in done))

    seconds, hardware = _timed(once)
    expected = engine_s(case.request(hardware), "rollout", 1, 1)
    # Some responses end early: the passes that were made are those of the longest.
    passes = float(np.median(written))
    return [
        Point(
            f"{case.name}, rollouts", "ms a decoding step", 1e3 * expected / rollouts.response, 1e3 * seconds / passes
        )
    ]


def _training(case: Case) -> list[Point]:
    torch.set_num_threads(available_cpus())
    work = case.request(find_hardware("cpu")).workload(1)
    _start_process_group()
    before = _resident("VmRSS")
    engine, batches = _student_and_batches(case, work.micro_batches)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on VmHWM counts anew

    def step() -> None:
        for batch in batches:
            output = engine(batch, "completion")
            engine.backward(output[0])
            engine.step()

    seconds, hardware = _timed(step)
    peak = _resident("VmHWM") - before
    request = case.request(hardware)
    expected, memory = sum(train_parts(request, 1).values()), worker_memory(request, 1).total
    return [
        Point(f"{case.name}, optimizer step", "s", expected, seconds),
        Point(f"{case.name}, memory of the training worker", "MiB", memory / 2**20, peak / 2**20),
    ]


def _student_and_batches(case: Case, micro_batches: int) -> tuple[Any, list[Any]]:
    """The module that a training worker wraps, under DeepSpeed, and the micro-batches of one step."""
    from raycomplete.core.depth_sampler import DepthSampler
    from raycomplete.core.loss_types import LossSettings
    from raycomplete.data.chat import ChatCodec
    from raycomplete.data.checkpoints import TORCH_DTYPES, fingerprint, load_model
    from raycomplete.data.head_spec import load_head, read_head_spec
    from raycomplete.training import engine as ds
    from raycomplete.training.batches import BatchBuilder
    from raycomplete.training.feed import ScoreFeed
    from raycomplete.training.packing import deal
    from raycomplete.training.plan import Planner
    from raycomplete.training.samples import AnchorSample, RecoverySample, SampleSet
    from raycomplete.training.student import HeadSettings, StudentModule

    config, dtype = case.config, case.config.models.dtype
    train, rng = config.train, np.random.default_rng(0)
    spec = read_head_spec(
        case.path,
        vocab_size=ChatCodec(case.path).vocab_size,
        model_fingerprint=fingerprint(case.path),
        tokenizer_hash="benchmark",
    )
    lm = load_model(case.path, dtype)
    lm.train()
    teachers = {role: load_head(spec, dtype=TORCH_DTYPES[dtype]) for role in ("aligned", "base")}
    loss = LossSettings.from_config(train)
    head = HeadSettings(spec.scale, spec.softcap, spec.vocab_size)
    module = StudentModule(lm, head, teachers, loss, external_head=False)
    settings = ds.deepspeed_settings(
        train, dtype, micro_batch=train.micro_batch, accumulation=micro_batches, steps=100, lr=1e-5
    )
    engine = ds.start_engine(module, settings)
    prompts = [_tokens(rng, case.prompt) for _ in range(case.batch)]
    samples = SampleSet(
        anchor=tuple(AnchorSample(f"a{i}", p, _tokens(rng, case.answer)) for i, p in enumerate(prompts)),
        recovery=tuple(
            RecoverySample(f"r{i}", p, p, _tokens(rng, case.answer), _tokens(rng, 24)) for i, p in enumerate(prompts)
        ),
    )
    planner = Planner(
        samples, anchor_batch=case.batch, recovery_batch=case.batch, seed=0, max_depth=config.rollout.max_harmful_tokens
    )
    source = _RandomScores(spec.hidden_size, TORCH_DTYPES[dtype])
    feed = ScoreFeed(
        {"aligned": source, "base": source}, max_depth=case.answer, penalty=loss.penalty > 0, contrastive=False
    )
    feed.request(0, *planner.samples_of(0))
    plan = planner.plan(0, DepthSampler(train.depth, 0))
    builder = BatchBuilder(penalty=loss.penalty > 0, contrastive=False, scale=float(micro_batches))
    scores = feed.take(0)
    return engine, [builder.build(chunk, plan, scores) for chunk in deal(plan.local(0, 1), micro_batches)]


class _RandomScores:
    """Hidden states of no model (a `ScoreSource`): the loss costs the same."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self._hidden_size, self._dtype = hidden_size, dtype

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return list(sequences)

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Nothing runs ahead here."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        return [torch.randn(len(ids) - prompt, self._hidden_size).to(self._dtype) for ids, prompt in reference]


def _start_process_group() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)


def _timed(work: Callable[[], object]) -> tuple[float, Hardware]:
    """Median seconds of a call after one warm-up, and the mean of the hardware before and after."""
    work()
    first = measured_cpu()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    last = measured_cpu()
    names = ("bfloat16_flops", "float32_flops", "memory_bandwidth", "copy_bandwidth", "call_s", "softmax_per_s")
    mean: dict[str, Any] = {name: (getattr(first, name) + getattr(last, name)) / 2 for name in names}
    return float(np.median(seconds)), replace(first, **mean)


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
