"""raycomplete's trainer on the same work: anchor rows only (forward KL to one teacher), Ray Train + DeepSpeed.

One worker, bfloat16 weights with float32 master weights and gradients. The teacher is read either in the worker's own
process, as TRL does it, or by the vLLM scorer of a real run, which reads ahead in a process of its own.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raycomplete.config import TeacherConfig, TrainConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.heads import HeadSpec, read_head_spec
from raycomplete.data.samples import AnchorSample, SampleSet, write_samples
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scorers import TeacherClient
from raycomplete.engines.spec import EngineSpec
from raycomplete.methods.completion import Completion, LossWeights
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.training.batches import pack
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit
from tests.benchmarks.environment import ROOT
from tests.benchmarks.training.workload import Throughput, Workload

_MAX_LENGTH = 256
_START_TIMEOUT_S = 300.0


def run_local(workload: Workload) -> Throughput:
    """The teacher in the worker's process."""
    with _ray(), tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "cpu_seconds"
        return _run(workload, LocalTeacher(workload.teacher, workload.per_device_batch_size, marks), marks)


def run_engine(workload: Workload) -> Throughput:
    """The teacher in a vLLM scorer."""
    with _ray():
        client = _start_scorer(workload)
        try:
            return _run(workload, client)
        finally:
            client.stop()


class LocalTeacher:
    """Stands in for a `TeacherClient`: a frozen model read by transformers in this process, a micro-batch at a time.

    Each step begins by collecting its scores, so this is also where the processor time of the worker is read.
    """

    def __init__(self, path: Path, per_device_batch_size: int, marks: Path) -> None:
        self._path = path
        self._per_device_batch_size = per_device_batch_size
        self._marks = marks
        self._model: Any = None

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return list(sequences)

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Nothing runs ahead here."""

    @torch.no_grad()
    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        with self._marks.open("a", encoding="ascii") as marks:
            marks.write(f"{time.process_time()}\n")
        if self._model is None:
            self._model = load_model(self._path, "bfloat16").base_model
        states: list[torch.Tensor] = []
        for start in range(0, len(reference), self._per_device_batch_size):
            states += self._read(reference[start : start + self._per_device_batch_size])
        return states

    def _read(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
        """Final hidden states that predict each answer; sequences stand side by side, as in training."""
        lengths = [len(tokens) - 1 for tokens, _ in rows]
        places, width = pack(lengths, self._model.config.hidden_size)
        shape = (1 + max(row for row, _ in places), width)
        input_ids_BT, position_ids_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for (tokens, _), length, (row, column) in zip(rows, lengths, places, strict=True):
            input_ids_BT[row, column : column + length] = torch.tensor(tokens[:-1])
            position_ids_BT[row, column : column + length] = torch.arange(length)
        hidden_BTH = self._model(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state
        return [
            hidden_BTH[row, column + num_prompt - 1 : column + length].clone()
            for (_, num_prompt), length, (row, column) in zip(rows, lengths, places, strict=True)
        ]


@contextmanager
def _ray() -> Iterator[None]:
    """A cluster of this machine only while it is needed, so that it takes nothing from the other trainers."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,  # logical: the worker and the scorer share the cores
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2**28,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},  # workers unpickle LocalTeacher
    )
    try:
        yield
    finally:
        ray.shutdown()


def _run(workload: Workload, source: Any, marks: Path | None = None) -> Throughput:
    samples = SampleSet(
        tuple(AnchorSample(str(i), prompt, answer) for i, (prompt, answer) in enumerate(workload.sequences()))
    )
    train = TrainConfig(
        steps=workload.steps,
        lr=workload.lr,
        seed=workload.seed,
        per_device_batch_size=workload.per_device_batch_size,
        checkpoint_every=workload.steps,
    )
    weights = LossWeights(anchor=1.0, recovery=0.0, push_forward=0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "samples.jsonl", samples)
        job = TrainJob(
            method=Completion(anchor_batch_size=workload.batch, weights=weights),
            start=workload.student,
            output=folder / "student",
            folder=folder,
            samples=folder / "samples.jsonl",
            dtype="bfloat16",
            train=train,
            student_head=_head_spec(workload, workload.student),
            teacher_heads={"aligned": _head_spec(workload, workload.teacher)},
            scorers={"aligned": source},
            prefetch=workload.tail_steps,
            threads=workload.threads,
        )
        fit(job, cpus_per_worker=1, gpus_per_worker=0)
        rows = read_metrics(job.metrics_file)
    cpu_marks = None if marks is None else [float(line) for line in marks.read_text(encoding="ascii").split()]
    return Throughput.of_steps(workload, [row["tokens"] for row in rows], [row["seconds"] for row in rows], cpu_marks)


def _head_spec(workload: Workload, path: Path) -> HeadSpec:
    return read_head_spec(path, workload.vocab_size, "benchmark")


def _start_scorer(workload: Workload) -> TeacherClient:
    prompt, answer = workload.sequences()[0]
    client = TeacherClient.start(
        "aligned",
        _head_spec(workload, workload.teacher),
        EngineSpec(str(workload.teacher), "bfloat16", _MAX_LENGTH, threads=workload.threads, num_cpus=1),
        TeacherConfig(),
        [ScoreRequest(prompt + answer, len(prompt))],
    )
    client.wait_until_ready(_START_TIMEOUT_S)
    return client
