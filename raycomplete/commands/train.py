"""`raycomplete train`: sample, score, train, evaluate, report. Each stage leaves its result in the run folder.

    samples.jsonl  ->  checkpoints/, metrics.jsonl, profile.json, student/  ->  evaluation/, summary.json, report.html

A stage whose result is there is not run again, so `--resume` continues an interrupted run where it stopped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycomplete.commands.evaluate import print_result, write_summary
from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES, check_trainable
from raycomplete.data.families import is_mixture, text_config
from raycomplete.data.inputs import KINDS, Prompts, prepare_models, prepare_prompts, training_fingerprints
from raycomplete.data.samples import read_samples, write_samples
from raycomplete.engines.cluster import ResourcePlan, plan_run
from raycomplete.engines.generation_cache import SAMPLING_FILE
from raycomplete.engines.run import Engines, OutputFolder, Run, open_run
from raycomplete.evaluation.attack_resources import check_evaluation, evaluation_inputs, extra_engines, training_workers
from raycomplete.evaluation.benign_nll import measure_benign_nll
from raycomplete.evaluation.defences.start import check_defence
from raycomplete.evaluation.roles import evaluate_roles, held_out_sets
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.machine import available_cpus, compiler_problem
from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.runtime.types import MODEL_ROLES, ModelRole, Prompt
from raycomplete.training.checkpoints import check_space, count_parameters
from raycomplete.training.job import ResponseJudge, TrainJob
from raycomplete.training.metrics import describe_terms
from raycomplete.training.on_policy import StudentEngines
from raycomplete.training.sampling import make_samples
from raycomplete.training.trainer import fit

SAME = ("models", "data", "rollout", "method", "train")  # sections that decide what is trained
_RESTED_BYTES = 400 * 2**20  # of weights: a smaller engine costs more seconds to start again than its memory is worth


@stored()
def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Completes the alignment of a model and proves it."""
    console = console or Console()
    started = time.perf_counter()
    config.models.refuse_thinking()
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(config, training=True)
        prompts = prepare_prompts(config, models.codec)
        check_evaluation(config)
        check_defence(config, models)
        settings = {"lora": config.train.lora_rank > 0, "trust_remote_code": config.models.trust_remote_code}
        check_trainable(models.paths["student"], synced=config.rollout.on_policy, **settings)
    inputs = training_fingerprints(models, prompts)  # an evaluation checks its own
    folder = OutputFolder(config, same=SAME, resume=resume, overwrite=overwrite, inputs=inputs)
    folder.check()
    if resume and is_finished(config, folder.path, evaluation_inputs(config, prompts)):
        summary = read_json(folder.path / "summary.json") or {}
        console.note("The run is finished already")
        print_result(summary, folder.path, console)
        return folder.path
    plan = resources(config)
    if not (folder.path / "student" / "config.json").is_file():
        check_space(folder.path, models.paths["student"], config.models.weight_dtype, config.train)
    with open_run(folder, models, prompts, plan, console) as run:
        console.note(f"Run folder: {run.folder}")
        student = run.folder / "student"
        trained = (student / "config.json").is_file()  # then there is nothing left to score
        parity = [] if trained else _parity_sequences(prompts, models.codec, config.teacher.parity_prompts)
        with run.start_engines(parity_sequences=parity):
            run.prompts = held_out_sets(run)
            _train_student(run)
            run.engines.stop_scorers()
            run.use_student(student.resolve())  # engines may start in another folder
            results = evaluate_roles(run, MODEL_ROLES)
            nll = measure_benign_nll(run, MODEL_ROLES)
    summary = write_summary(run, results, nll, time.perf_counter() - started)
    print_result(summary, run.folder, console)
    return run.folder


def resources(config: RunConfig) -> ResourcePlan:
    """Plans what a run of `train` places on the cluster."""
    return plan_run(
        config,
        scorers=("base", "aligned"),
        workers=config.train.num_workers,
        extras=extra_engines(config),
        attack_workers=training_workers(config),
    )


def is_finished(config: RunConfig, folder: Path, inputs: str | None = None) -> bool:
    """Tells whether a run folder holds the summary of just this evaluation, and of `inputs` where both are known."""
    summary = read_json(folder / "summary.json")
    if summary is None or summary["evaluation"] != config.evaluation.model_dump(mode="json"):
        return False
    return inputs is None or summary.get("evaluation_inputs", inputs) == inputs


def _train_student(run: Run) -> None:
    """Makes samples and trains; each is skipped where its result is there already."""
    config, models, console = run.config, run.models, run.console
    samples_file, student = run.folder / "samples.jsonl", run.folder / "student"
    stats_file = run.folder / "training.json"
    if (student / "config.json").is_file():
        console.note("The student is trained already")
        if not stats_file.is_file():  # killed between the export and this file
            write_json(stats_file, training_stats(config, run.folder / "metrics.jsonl", None, {}, {}))
        return
    if not samples_file.is_file():
        write_samples(samples_file, make_samples(run))
    (run.folder / SAMPLING_FILE).unlink(missing_ok=True)
    samples = read_samples(samples_file)
    prompts = [prompt for kind in KINDS for prompt in run.prompts.train[kind]]
    job = make_job(
        run,
        "student",
        student.resolve(),
        method=config.method,
        train=config.train,
        teacher_heads={role: models.heads[role] for role in ("aligned", "base")},
        scorers=dict(run.engines.scorers),
        prefetch=config.teacher.prefetch,
        rollout=config.rollout,
        student_engines=_student_engines(run, prompts),
        response_judge=ResponseJudge(run.judge, models.codec, {prompt.prompt_id: prompt for prompt in prompts}),
    )
    with _resting_generator(run):
        started = time.perf_counter()
        before = _scorer_totals(run.engines)
        run_training(run, job, f"Training on {len(samples.anchor)} + {len(samples.recovery)} samples")
        kept = read_json(job.kept_step_file)
        if kept is not None:
            console.note(kept["why"])
        scored = {name: total - before[name] for name, total in _scorer_totals(run.engines).items()}
        wall_s = time.perf_counter() - started
        write_json(stats_file, training_stats(config, job.metrics_file, wall_s, scored, run.engines.stats))


@contextmanager
def _resting_generator(run: Run) -> Iterator[None]:
    """Frees the rollout engine's memory during training on fixed samples, on a CPU, unless the model is small.

    On a GPU its share of the device stays reserved, so nobody could use what is freed.
    """
    config = run.config
    size = count_parameters(run.models.paths["student"]) * TORCH_DTYPES[config.models.weight_dtype].itemsize
    if config.rollout.on_policy or run.cluster.use_gpu or size < _RESTED_BYTES:
        yield
        return
    run.engines.generator.rest()
    run.console.note("The rollout engine gives its memory to the training; it starts again for the evaluation")
    yield
    run.engines.stop_scorers()  # room first
    with run.console.stage("Rollout engine started again"):
        run.engines.generator.wait_until_ready(config.cluster.start_timeout_s)


def _student_engines(run: Run, prompts: Sequence[Prompt]) -> StudentEngines | None:
    """Makes the engines of the student's own rollouts, where the run file asks for them."""
    if not run.config.rollout.on_policy:
        return None
    pool = run.engines.generator.with_weights(str(run.models.paths["student"]))
    timeout_s = run.config.cluster.start_timeout_s
    return StudentEngines(pool, run.models.codec, run.judge, prompts, run.config.rollout, start_timeout_s=timeout_s)


def make_job(run: Run, start: ModelRole, output: Path, **settings: Any) -> TrainJob:
    """Makes a job of training on the run folder's samples, from the model of a role to a checkpoint."""
    models = run.config.models
    architecture = text_config(read_json(run.models.paths[start] / "config.json") or {})
    if settings["train"].lora_rank and is_mixture(architecture):
        run.console.note("A mixture of experts: LoRA adapts attention, and router and experts stay as they are")
    if run.cluster.use_gpu and (problem := compiler_problem()):
        run.console.note(f"The loss runs in PyTorch, not in Triton: {problem} (raycomplete doctor names the remedy)")
    return TrainJob(
        start=run.models.paths[start],
        output=output,
        folder=run.folder.resolve(),
        samples=(run.folder / "samples.jsonl").resolve(),
        dtype=models.weight_dtype,
        student_head=run.models.heads[start],
        threads=max(available_cpus() // run.config.train.num_workers, 1),  # the workers share this machine's cores
        plugins=tuple(run.config.plugins),
        use_gpu=run.cluster.use_gpu,
        trust_remote_code=models.trust_remote_code,
        **settings,
    )


def run_training(run: Run, job: TrainJob, title: str) -> None:
    """Trains under a progress bar."""
    cluster = run.config.cluster
    terms = [name for name, weight in job.method.loss_weights().items() if weight > 0]
    names = ["loss", *(terms if len(terms) > 1 else [])]
    with run.console.progress(title, job.train.steps) as advance:

        def on_step(row: dict[str, Any]) -> None:
            parts = [f"{name} {row[name]:.4f}" for name in names if row.get(name) is not None]  # NaN is left out
            if row.get("bad_steps"):  # not in rows of a run that an earlier version began
                parts.append(f"{row['bad_steps']} steps left out")
            if "depth_mean" in row:
                parts.append(f"depth {row['depth_mean']:.0f}")
            if "compliance" in row:
                parts.append(f"complies {row['compliance']:.2f}")
            parts.append(f"{row['tokens_per_s']:.0f} tok/s")
            advance(row["step"], ", ".join(parts))

        fit(
            job,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=cluster.gpus_per_worker,
            placement=cluster.worker_placement,
            on_step=on_step,
            stopping=run.is_stopping,
        )


def training_stats(
    config: RunConfig, metrics_file: Path, wall_s: float | None, scored: Mapping[str, float], engines: Mapping[str, Any]
) -> dict[str, Any]:
    """Sums up the metrics of all steps (resumed ones included): training.json, and the `train` part of summary.json."""
    rows = read_metrics(metrics_file)
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    validation_s = sum(row.get("validation_s", 0.0) for row in rows)  # no part of the seconds of its step

    def share(name: str) -> float:
        return sum(row.get(name, 0.0) for row in rows) / seconds if seconds else 0.0

    return {
        "steps": len(rows),
        "seconds": seconds,
        "wall_seconds": wall_s,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "seconds_per_step": statistics.median(row["seconds"] for row in rows) if rows else None,
        "peak_memory_gib": max((row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row), default=None),
        "teacher_tokens_per_s": scored["tokens"] / scored["seconds"] if scored.get("seconds") else None,
        "teacher_wait_fraction": share("teacher_wait_s"),
        "rollout_wait_fraction": share("rollout_wait_s"),
        "sync_fraction": share("sync_s"),
        "rollout_tokens": sum(row.get("rollout_tokens", 0) for row in rows),
        "max_staleness": max((row["staleness"] for row in rows if "staleness" in row), default=None),
        "validation_fraction": validation_s / (seconds + validation_s) if validation_s else 0.0,
        "kept_step": read_json(metrics_file.parent / "kept_step.json"),
        "stopped_early": bool(rows) and bool(rows[-1].get("stopped")),
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_last": rows[-1]["loss"] if rows else None,
        "terms": describe_terms(config.method.loss()),
        "engines": engines,
    }


def _scorer_totals(engines: Engines) -> dict[str, float]:
    stats = [scorer.stats() for scorer in engines.scorers.values()]
    return {name: sum(item[name] for item in stats) for name in ("tokens", "seconds")}


def _parity_sequences(prompts: Prompts, codec: ChatCodec, count: int) -> list[tuple[tuple[int, ...], int]]:
    """Makes sequences of a prompt and a few response tokens, for the parity gate; any response will do."""
    sequences = []
    for prompt in (*prompts.train["benign"], *prompts.train["harmful"])[:count]:
        prompt_ids = prompt.encoded(codec)
        answer_ids = codec.encode_answer(prompt.answer or prompt.text)[:48]
        sequences.append(((*prompt_ids, *answer_ids), len(prompt_ids)))
    return sequences
