"""One measurement: partitions read by the scorers alone and by the whole diagnosis, in turn, on the same engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from raycomplete.config import RunConfig, parse
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.heads import load_head
from raycomplete.data.inputs import Models, prepare_models
from raycomplete.data.stream import partition_metadata, read_partition
from raycomplete.diagnosis.measurement import Measurement, make_room_for_engines
from raycomplete.diagnosis.partitions import measure_partition, write_measured
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.engines.cluster import ResourcePlan, connect, engine_request
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scorers import TeacherClient
from raycomplete.engines.spec import EngineSpec
from raycomplete.losses.heads import Head

ROLES = ("base", "aligned")


@dataclass(frozen=True)
class Work:
    """A diagnosis whose cost is measured.

    Attributes:
        base: Checkpoint.
        aligned: Checkpoint; its weights do not change the cost, so it may be base again.
        prompts: Prompts in all.
        partition_prompts: Prompts of one partition.
        prompt_tokens: Length of each prompt.
        answer_tokens: Response tokens that are measured.
        dtype: Of both models.
        engines: False takes random hidden states in place of the scorers': the driver's own part, memory and time.
        alone_every: Which partitions the scorers also read alone: 1 for all, 5 for every fifth, from the first.
    """

    base: str
    aligned: str
    prompts: int = 96
    partition_prompts: int = 32
    prompt_tokens: int = 30
    answer_tokens: int = 512
    dtype: str = "bfloat16"
    engines: bool = True
    alone_every: int = 1

    @property
    def num_partitions(self) -> int:
        return -(-self.prompts // self.partition_prompts)

    def config(self) -> RunConfig:
        """The run file that the pipeline would be given."""
        models = {"base": self.base, "aligned": self.aligned, "dtype": self.dtype}
        longest = self.prompt_tokens + self.answer_tokens + 1
        tree = {"models": models | {"max_length": longest}, "data": {"source": "organism"}, "output": {"name": "x"}}
        tree["diagnose"] = {"max_tokens": self.answer_tokens, "partition_prompts": self.partition_prompts}
        tree["teacher"] = {"cache_gib": 0.0}
        return parse(tree, "the benchmark")

    def samples(self, number: int, vocab_size: int) -> list[DiagnosisSample]:
        """Random tokens, other ones in every partition."""
        rng = np.random.default_rng([number, 1])
        left = min(self.partition_prompts, self.prompts - number % self.num_partitions * self.partition_prompts)
        draw = rng.integers(5, vocab_size, size=(left, self.prompt_tokens + self.answer_tokens)).tolist()
        cut = self.prompt_tokens
        return [DiagnosisSample(f"{number}-{i}", tuple(ids[:cut]), tuple(ids[cut:])) for i, ids in enumerate(draw)]


@dataclass
class Timed:
    """Seconds of one kind of pass, partition by partition.

    Attributes:
        wall_s: By the clock.
        cpu_s: Processor time of this process and of the engines: what other work on the same cores changes least.
    """

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@dataclass
class Found:
    """Measurements of one diagnosis.

    Attributes:
        engine: Scorers alone: the same batches asked for and taken, nothing done with them.
        diagnosis: The same with the rows of both heads and the Parquet file.
        rss_mib: Memory of this process after each partition.
        peak_mib: Its largest memory at any time.
        equal_after_resume: Whether the last partition, thrown away and made again, is the same to the last bit.
        largest_difference: Of any of its values.
        response_tokens: Response tokens of all partitions.
        alone_tokens: Those of the partitions that the scorers also read alone.
        alone_ratio: Seconds of the scorers alone over those of the whole diagnosis, on the same partitions.
    """

    engine: Timed = field(default_factory=Timed)
    diagnosis: Timed = field(default_factory=Timed)
    rss_mib: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    equal_after_resume: bool = False
    largest_difference: float = 0.0
    response_tokens: int = 0
    alone_tokens: int = 0
    alone_ratio: float = 0.0


def measure(work: Work, folder: Path) -> Found:
    """Starts the two scorers, measures, and ends them.

    Args:
        work: What is diagnosed.
        folder: Where partitions go.
    """
    config, found = work.config(), Found()
    models = prepare_models(config, ("base", "aligned"))
    vocab_size = models.codec.vocab_size
    with _sources(config, models, work, vocab_size) as sources:
        heads: dict[str, Head] = {
            role: load_head(models.heads[role], dtype=TORCH_DTYPES[config.models.dtype], device="cpu") for role in ROLES
        }
        make_room_for_engines(len(ROLES))  # as a diagnosis does
        measurement = Measurement(sources, heads, (1, 2), config.diagnose)
        for _ in measurement.hidden_states(work.samples(10**6, vocab_size)[:2]):
            pass  # first calls allocate
        with _watched_memory() as memory:
            diagnosis_s = 0.0
            for number in range(work.num_partitions):
                samples = work.samples(number, vocab_size)
                tokens = sum(len(sample.answer_ids) for sample in samples)
                found.response_tokens += tokens
                alone = number % work.alone_every == 0
                passes = [_engine_pass, _diagnosis_pass] if alone else [_diagnosis_pass]
                for one in passes if number // work.alone_every % 2 == 0 else passes[::-1]:
                    one(measurement, samples, folder, number, found)
                if alone:
                    found.alone_tokens += tokens
                    diagnosis_s += found.diagnosis.wall_s[-1]
                found.rss_mib.append(_rss_mib())
        found.peak_mib = memory.peak
        found.alone_ratio = sum(found.engine.wall_s) / diagnosis_s
        _resume(measurement, work, vocab_size, folder, found)
    return found


def _engine_pass(
    measurement: Measurement, samples: Sequence[DiagnosisSample], folder: Path, number: int, found: Found
) -> None:
    with _timed(found.engine):
        for _ in measurement.hidden_states(samples):
            pass


def _diagnosis_pass(
    measurement: Measurement, samples: Sequence[DiagnosisSample], folder: Path, number: int, found: Found
) -> None:
    with _timed(found.diagnosis):
        rows, tokens = measure_partition(measurement, samples)
        write_measured(folder, _name(number), rows, tokens, {"key": str(number)})


def _resume(measurement: Measurement, work: Work, vocab_size: int, folder: Path, found: Found) -> None:
    """Makes the last partition again, as a run does that was killed while it wrote it."""
    name = _name(work.num_partitions - 1)
    file = folder / "partitions" / f"{name}.parquet"
    before = read_partition(file)
    file.unlink()
    assert partition_metadata(file) is None
    rows, tokens = measure_partition(measurement, work.samples(work.num_partitions - 1, vocab_size))
    write_measured(folder, name, rows, tokens, {"key": name})
    again = read_partition(file)
    found.equal_after_resume = all(np.array_equal(before[column], again[column]) for column in before)
    found.largest_difference = max(float(np.abs(before[c].astype(float) - again[c]).max()) for c in before)


@contextmanager
def _sources(config: RunConfig, models: Models, work: Work, vocab_size: int) -> Iterator[Mapping[str, Any]]:
    if not work.engines:
        yield {role: RandomStates(models.heads[role].hidden_size, seed) for seed, role in enumerate(ROLES)}
        return
    plan = ResourcePlan((engine_request(config.cluster, "scorer", len(ROLES)),))
    with connect(config.cluster, plan), _scorers(config, models) as clients:
        yield clients


class RandomStates:
    """Hidden states that nobody read, the same for the same sequences (stands in for a `TeacherClient`)."""

    def __init__(self, width: int, seed: int) -> None:
        self._width, self._seed = width, seed

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return sequences

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Nothing can be read ahead."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        drawn = torch.Generator().manual_seed(self._seed)
        # About as large as SmolLM2-135M's, of standard deviation 2.2: far larger ones give denormal weights, at which
        # a processor is slow.
        return [torch.randn(len(ids) - cut, self._width, generator=drawn).bfloat16().mul_(2) for ids, cut in reference]


@contextmanager
def _scorers(config: RunConfig, models: Models) -> Iterator[dict[str, TeacherClient]]:
    """Both pooling engines, proved on a short text, as a diagnosis starts them: bfloat16 errs more on random tokens."""
    prompt = models.codec.encode_prompt("Name three rivers of Europe and say what they have in common.")
    answer = models.codec.encode_answer("The Rhine, the Danube and the Elbe all begin in mountains and end in a sea.")
    parity = [ScoreRequest((*prompt, *answer), len(prompt))]
    clients: dict[str, TeacherClient] = {}
    try:
        for role in ROLES:
            head = models.heads[role]  # type: ignore[index]
            spec = EngineSpec.from_config(config, "scorer", head.path, use_gpu=False)
            clients[role] = TeacherClient.start(role, head, spec, config.teacher, parity)  # type: ignore[arg-type]
        for client in clients.values():
            client.wait_until_ready(config.cluster.start_timeout_s)
        yield clients
    finally:
        for client in clients.values():
            client.stop()


def _name(number: int) -> str:
    return f"harmful-{number:05d}"


@contextmanager
def _timed(into: Timed) -> Iterator[None]:
    wall, cpu = time.perf_counter(), _cpu_s()
    yield
    into.wall_s.append(time.perf_counter() - wall)
    into.cpu_s.append(_cpu_s() - cpu)


def _cpu_s() -> float:
    """Processor time of this process and everything that it started."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


class _Peak:
    peak = 0.0


@contextmanager
def _watched_memory() -> Iterator[_Peak]:
    """Looks at this process's memory every 50 ms."""
    found, over = _Peak(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            found.peak = max(found.peak, _rss_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
