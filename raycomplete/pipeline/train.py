"""The main job: sample, score, train, evaluate, report. Each stage leaves its result in the run folder.

    samples.jsonl  ->  checkpoints/, metrics.jsonl, profile.json, student/  ->  evaluation/, summary.json, report.html

A stage whose result is there is not run again, so `--resume` continues an interrupted run where it stopped.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from raycomplete.cluster import Cluster, Demand, connect
from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.pipeline.evaluate import evaluate_roles, held_out_sets, print_result, write_summary
from raycomplete.pipeline.fleet import Fleet, start_fleet
from raycomplete.pipeline.prepare import Models, Prompts, prepare_models, prepare_prompts
from raycomplete.pipeline.rollouts import make_samples
from raycomplete.pipeline.run_folder import check_run_folder, open_run_folder, write_json
from raycomplete.screen import Screen
from raycomplete.training.job import TrainJob
from raycomplete.training.metrics import read_metrics
from raycomplete.training.samples import read_samples, write_samples
from raycomplete.training.trainer import fit
from raycomplete.types import MODEL_ROLES

_ENGINES = 3  # two scorers and a generator


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False, screen: Screen | None = None) -> Path:
    """Completes the alignment of a model and proves it.

    Args:
        config: Run file.
        resume: Continue an interrupted run.
        overwrite: Replace an earlier run of this name.
        screen: Where progress goes.

    Returns:
        The run folder; `summary.json` in it holds the headline numbers.

    Raises:
        RefusedError: Something is wrong with the run file, the checkpoints or the prompts; nothing was written.
        WorkError: Something failed on the way; what was finished is kept.
    """
    screen = screen or Screen()
    started = time.perf_counter()
    with screen.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(config)
        prompts = prepare_prompts(config, models.codec)
    check_run_folder(config, resume=resume, overwrite=overwrite)
    demand = Demand(engines=_ENGINES, workers=config.train.num_workers)
    with connect(config.cluster, demand) as cluster:
        folder = open_run_folder(config, resume=resume, overwrite=overwrite)
        screen.note(f"Run folder: {folder}")
        parity = _parity_sequences(prompts, models.codec, config.scoring.parity_prompts)
        with start_fleet(config, cluster, models, screen, parity_sequences=parity) as fleet:
            prompts = held_out_sets(config, models, prompts, fleet, folder, screen)
            _train_student(config, cluster, models, prompts, fleet, folder, screen)
            fleet.stop_scorers()
            trained = models.paths | {"student": folder / "student"}
            results = evaluate_roles(config, models, trained, prompts, fleet, folder, screen, MODEL_ROLES)
    summary = write_summary(config, folder, results, time.perf_counter() - started)
    print_result(summary, folder, screen)
    return folder


def _train_student(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    prompts: Prompts,
    fleet: Fleet,
    folder: Path,
    screen: Screen,
) -> None:
    """Samples and training, each skipped where its result is there already."""
    samples_file, student = folder / "samples.jsonl", folder / "student"
    if (student / "config.json").is_file():
        screen.note("The student is trained already")
        return
    if not samples_file.is_file():
        write_samples(samples_file, make_samples(config, models, prompts, fleet, screen))
    samples = read_samples(samples_file)
    job = TrainJob(
        objective="completion",
        start=models.paths["student"],
        output=student.resolve(),
        folder=folder.resolve(),
        samples=samples_file.resolve(),
        dtype=config.models.dtype,
        train=config.train,
        student_head=models.heads["student"],
        teacher_heads={role: models.heads[role] for role in ("aligned", "base")},
        sources=dict(fleet.scorers),
        prefetch=config.scoring.prefetch,
        threads=worker_threads(config),
        use_gpu=cluster.use_gpu,
        trust_remote_code=config.models.trust_remote_code,
    )
    started = time.perf_counter()
    before = _scorer_totals(fleet)
    run_training(job, config, screen, f"Training on {len(samples.anchor)} + {len(samples.recovery)} samples")
    scored = {name: total - before[name] for name, total in _scorer_totals(fleet).items()}
    write_json(folder / "training.json", training_facts(job, time.perf_counter() - started, scored, fleet.facts))


def run_training(job: TrainJob, config: RunConfig, screen: Screen, title: str) -> None:
    """Trains under a progress bar."""
    with screen.progress(title, job.train.steps) as advance:

        def on_step(row: dict[str, Any]) -> None:
            parts = [f"loss {row['loss']:.4f}"]
            if job.objective == "completion":
                parts += [f"{name} {row[name]:.4f}" for name in ("anchor", "recovery", "penalty")]
                parts.append(f"depth {row['depth_mean']:.0f}")
            parts.append(f"{row['tokens_per_s']:.0f} tok/s")
            advance(row["step"], ", ".join(parts))

        fit(
            job,
            cpus_per_worker=config.cluster.cpus_per_worker,
            gpus_per_worker=config.cluster.gpus_per_worker,
            on_step=on_step,
        )


def training_facts(job: TrainJob, wall_s: float, scored: dict[str, float], engines: dict[str, Any]) -> dict[str, Any]:
    """The `train` part of summary.json, from the metrics of all steps (resumed ones included)."""
    rows = read_metrics(job.metrics_file)
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    waited = sum(row["scoring_wait_s"] for row in rows)
    return {
        "steps": len(rows),
        "seconds": seconds,
        "wall_seconds": wall_s,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "scoring_tokens_per_s": scored["tokens"] / scored["seconds"] if scored["seconds"] else 0.0,
        "scoring_wait_fraction": waited / seconds if seconds else 0.0,
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_last": rows[-1]["loss"] if rows else None,
        "engines": engines,
    }


def worker_threads(config: RunConfig) -> int:
    """CPU threads of one training worker: the cores of this machine, shared between the workers."""
    return max((os.cpu_count() or 1) // config.train.num_workers, 1)


def _scorer_totals(fleet: Fleet) -> dict[str, float]:
    stats = [scorer.stats() for scorer in fleet.scorers.values()]
    return {name: sum(item[name] for item in stats) for name in ("tokens", "seconds")}


def _parity_sequences(prompts: Prompts, codec: ChatCodec, count: int) -> list[tuple[tuple[int, ...], int]]:
    """Prompts with a few response tokens, for the gate of the scorers; any response will do."""
    sequences = []
    for prompt in (*prompts.train["benign"], *prompts.train["harmful"])[:count]:
        prompt_ids = codec.encode_prompt(prompt.text)
        answer_ids = codec.encode_answer(prompt.answer or prompt.text)[:48]
        sequences.append(((*prompt_ids, *answer_ids), len(prompt_ids)))
    return sequences
