"""`raycomplete study`: methods x seeds x models, each a run of its own, on one cluster, and one table of all.

    <study>/<model>/aligned/              base and aligned, evaluated once; the runs below find their answers again
    <study>/<model>/<method>-seed<seed>/  a run of `raycomplete train`
    <study>/<model>/<defence>/            an evaluation of aligned behind a defence at inference
    <study>/logs/                         what each run said
    <study>/inputs.json                   fingerprints of checkpoints and prompts, which must stay what they are
    <study>/study.json, study.md, study.html, figures/

Each run is a process of its own, which is killed with the study. It resumes by itself, so that a study that is started
again does nothing twice. Samples go from the first run that made them to all others for which they are equal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray

from raycomplete.commands import evaluate as evaluating
from raycomplete.commands import train as training
from raycomplete.config import RunConfig, dump
from raycomplete.config.study import FROZEN, Study, StudyRun
from raycomplete.data.inputs import (
    evaluation_fingerprint,
    prepare_models,
    prepare_prompts,
    samples_key,
    training_fingerprints,
)
from raycomplete.engines.cluster import ResourcePlan, connect, is_local, nodes_of
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.run import OutputFolder
from raycomplete.engines.spec import object_store_bytes
from raycomplete.evaluation.attack_resources import check_evaluation
from raycomplete.evaluation.defences.start import check_defence
from raycomplete.report.study import write_study
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, StoppedError, WorkError
from raycomplete.runtime.files import RowStore, read_json, write_bytes, write_json, write_text
from raycomplete.runtime.logs import FOLDER, RUN
from raycomplete.runtime.signals import Stop, stop
from raycomplete.training.checkpoints import count_parameters

_POLL_S = 0.2
_STOP_S = 20.0  # a run that is asked to stop gets its own seconds for a step and a checkpoint, and leaves
_LIBC = ctypes.CDLL(None)  # loaded before any fork
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_SHARED_PARTS = ("trials", "judgements", "benign_nll", "remote")


@dataclass
class _Job:
    """A run of a study and its process."""

    run: StudyRun
    key: str  # names its samples; empty where it makes none
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    code: int | None = None

    @property
    def folder(self) -> Path:
        return self.run.config.output.folder

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def log(self) -> Path:
        return self.folder.parent.parent / "logs" / f"{self.folder.parent.name}-{self.folder.name}.log"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.code is None

    @property
    def is_finished(self) -> bool:
        """Tells whether the summary and the result that the table reads are both of this evaluation."""
        role = FROZEN if self.run.label == FROZEN else "student"
        result = read_json(self.folder / "evaluation" / f"{role}.json") or {}
        settings = {**self.run.config.evaluation.model_dump(mode="json"), "temperature": 0.0}
        return training.is_finished(self.run.config, self.folder) and result.get("settings") == settings


def study(study: Study, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Trains and evaluates every run of a study, and writes its table and figures into its folder, which it returns."""
    console = console or Console()
    if study.folder.is_dir() and any(study.folder.iterdir()) and not (resume or overwrite):
        words = "Add --resume to continue it or --overwrite to replace it, or choose another output.name."
        raise ConfigError(f"The folder {study.folder} holds a study already.", words)
    study = _checked(study, console)
    with _alone(study.folder, overwrite=overwrite and not resume):
        _refuse_others(study)
        _refuse_other_inputs(study)
        jobs = [_Job(run, samples_key(run.config, run.inputs) if run.trains else "") for run in study.runs]
        if not all(job.is_finished for job in jobs):
            with _connected(study, console) as places:
                _work(jobs, places, stop, console, ray.get_runtime_context().gcs_address)
        failed = [job for job in jobs if not job.is_finished]
        for title, rows in write_study(study, [job.run for job in jobs if job.is_finished]):
            console.table(title, rows)
    if failed:
        logs = ", ".join(str(job.log) for job in failed[:3])
        raise WorkError(
            f"{len(failed)} of {len(jobs)} runs are not finished: {', '.join(job.run.name for job in failed)}.",
            f"See {logs}; then run again with --resume.",
        )
    return study.folder


def _checked(study: Study, console: Console) -> Study:
    """Refuses what would fail at work, and fills in number formats and how many runs work at a time."""
    runs = []
    dtypes: dict[tuple[str, str], RunConfig] = {}
    with console.stage(f"Checked {len(study.runs)} runs"):
        for run in study.runs:
            key = run.model, str(run.config.models.dtype)
            known = dtypes.get(key) or dtypes.setdefault(key, resolve_dtype(run.config, console))
            settings = run.config.models.model_copy(update={"dtype": known.models.dtype})
            config = run.config.model_copy(update={"models": settings})
            models = prepare_models(config, training=run.trains)
            prompts = prepare_prompts(config, models.codec)
            check_evaluation(config)
            check_defence(config, models)
            inputs = training_fingerprints(models, prompts) | {"evaluation prompts": evaluation_fingerprint(config)}
            count = count_parameters(models.paths["student"]) if "student" in models.paths else 0
            store_bytes = object_store_bytes(config, count, config.models.weight_dtype)
            runs.append(replace(run, config=config, inputs=inputs, store_bytes=store_bytes))
    alone = study.config.parallel is None and is_local(runs[0].config.cluster)
    settings_of_study = study.config.model_copy(update={"parallel": 1}) if alone else study.config
    return replace(study, config=settings_of_study, runs=tuple(runs))


def _refuse_others(study: Study) -> None:
    """Refuses to continue a study whose runs were started with other settings."""
    kept = {name: os.environ.get(name) for name in (RUN, FOLDER)}
    for run in study.runs:
        if (run.config.output.folder / "config.yaml").is_file():
            same, free = (training.SAME, ()) if run.trains else (evaluating.SAME, evaluating.FREE)
            OutputFolder(run.config, same=same, free=free, resume=True).check()
    for name, value in kept.items():  # `check` names the run for this process, which is none of them
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _refuse_other_inputs(study: Study) -> None:
    """Refuses to continue runs whose checkpoints or prompts are not what they were, and notes those of the others."""
    file = study.folder / "inputs.json"
    known = read_json(file) or {}
    changed = {
        f"{name} of {run.model}"
        for run in study.runs
        if (run.config.output.folder / "config.yaml").is_file()
        for name, content in known.get(run.name, {}).items()
        if run.inputs.get(name) != content
    }
    if changed:
        raise ConfigError(
            f"Since the study in {study.folder} was started, the content of these changed: "
            f"{', '.join(sorted(changed))}.",
            "Put back what was there, run again with --overwrite, or choose another output.name.",
        )
    write_json(file, known | {run.name: dict(run.inputs) for run in study.runs})


@contextmanager
def _alone(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Holds the study's folder, so that no second process works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "study.lock"
    if not lock.is_file() and any(folder.iterdir()):
        words = f"The folder {folder} holds files and no study.lock, so no study made them."
        raise ConfigError(words, "Choose another output.name.")
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"Another process works in {folder}.", "Wait for it, or stop it.") from error
        if overwrite:
            for item in folder.iterdir():
                if item != lock:
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        yield


@contextmanager
def _connected(study: Study, console: Console) -> Iterator[int]:
    """Connects to the cluster of all runs, or starts one here; yields how many runs fit at a time."""
    config = study.runs[0].config
    plans = [training.resources(run.config) if run.trains else evaluating.resources(run.config) for run in study.runs]
    largest = max(plans, key=lambda plan: (plan.gpus, plan.cpus))
    asked = study.config.parallel
    # A cluster that is started here counts CPUs generously, so that any number would fit.
    together = (asked or 1) if is_local(config.cluster) else 1
    store_bytes = max(run.store_bytes for run in study.runs) * together
    with connect(config.cluster, ResourcePlan(largest.requests * together), console, store_bytes) as cluster:
        nodes = nodes_of(ray.nodes())
        fits = sum(node.cpus for node in nodes) // max(largest.cpus, 1e-6)
        if cluster.use_gpu and largest.gpus > 0:
            fits = min(fits, sum(node.gpus for node in nodes) // largest.gpus)
        yield asked or max(int(fits), 1)


def _work(jobs: Sequence[_Job], places: int, stop: Stop, console: Console, address: str) -> None:
    """Starts runs on the cluster at an address as places become free, until all have ended."""
    console.note(f"{len(jobs)} runs, {sum(job.is_finished for job in jobs)} of them finished; {places} at a time")
    waiting = [job for job in jobs if not job.is_finished]
    try:
        while waiting or any(job.is_running for job in jobs):
            for running in [job for job in jobs if job.is_running]:
                _collect(running, console)
            if stop.requested:
                raise StoppedError("The study stops on request; runs keep what they finished.", "Resume with --resume.")
            while sum(job.is_running for job in jobs) < places:
                following = next((job for job in waiting if _can_start(job, jobs)), None)
                if following is None:
                    break
                waiting.remove(following)
                _start(following, jobs, address)
                console.note(f"{following.run.name}: started")
            if waiting and not any(job.is_running for job in jobs):
                return  # what they wait for has failed
            time.sleep(_POLL_S)
    finally:
        _stop([job for job in jobs if job.is_running])


def _can_start(job: _Job, jobs: Sequence[_Job]) -> bool:
    """Tells whether what a run takes from others is there: the frozen models' answers, and samples."""
    frozen = _frozen(job, jobs)
    if frozen is job or not frozen.is_finished:
        return frozen is job
    makers = [other for other in jobs if job.key and other.key == job.key and other.is_running]
    return _samples_of(job, jobs) is not None or all(other.samples.is_file() for other in makers)


def _frozen(job: _Job, jobs: Sequence[_Job]) -> _Job:
    return next(other for other in jobs if other.run.model == job.run.model and other.run.label == FROZEN)


def _samples_of(job: _Job, jobs: Sequence[_Job]) -> Path | None:
    return next((other.samples for other in jobs if other.key == job.key and other.samples.is_file()), None)


def _start(job: _Job, jobs: Sequence[_Job], address: str) -> None:
    """Puts into a run's folder what others made for it, and starts its process."""
    folder, frozen = job.folder, _frozen(job, jobs)
    cluster = job.run.config.cluster.model_copy(update={"address": None})  # the study's, by RAY_ADDRESS
    settings = dump(job.run.config.model_copy(update={"cluster": cluster}))
    if not (folder / "config.yaml").is_file():
        write_text(folder / "config.yaml", settings)
    if job.run.trains and not (folder / "inputs.json").is_file():
        write_json(folder / "inputs.json", dict(job.run.inputs))  # the run refuses what has changed since then
    (folder / "summary.json").unlink(missing_ok=True)  # of another evaluation, or the run would take itself as finished
    if frozen is not job:
        share_answers(frozen.folder / "evaluation", folder / "evaluation")
    if job.key and (samples := _samples_of(job, jobs)) is not None and not job.samples.exists():
        _copy(samples, job.samples)
    command = ["train", "--resume"] if job.run.trains else ["evaluate"]
    run_file = folder / "run.yaml"  # config.yaml is the run's own record
    write_text(run_file, settings)
    log = job.log
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in (RUN, FOLDER)}
    with log.open("ab") as stream:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "raycomplete", command[0], str(run_file), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment | {"RAY_ADDRESS": address, "COLUMNS": "160"},
            start_new_session=True,  # Ctrl-C reaches the study alone, which tells its runs
            # The kernel kills a run whose study is killed, so that never two processes work in its folder.
            preexec_fn=partial(_LIBC.prctl, _DIE_WITH_PARENT, signal.SIGKILL),
        )
    job.began = time.monotonic()


def share_answers(source: Path, target: Path) -> None:
    """Adds the prefills and answers in the frozen models' folder evaluation/ to that of a run.

    A study that is resumed with more attacks finds the earlier answers in its runs.
    """
    if (source / "prefills.json").is_file():
        _copy(source / "prefills.json", target / "prefills.json")
    for file in (file for part in _SHARED_PARTS for file in source.glob(f"{part}/*.jsonl")):
        store = RowStore(target / file.relative_to(source), mode=file.stat().st_mode & 0o777)
        store.add(RowStore(file).values())


def _copy(source: Path, target: Path) -> None:
    """Copies a file whole, with its permissions."""
    write_bytes(target, source.read_bytes(), mode=source.stat().st_mode & 0o777)


def _collect(job: _Job, console: Console) -> None:
    """Notes the end of a run's process."""
    assert job.process is not None
    job.code = job.process.poll()
    seconds = time.monotonic() - job.began
    if job.code is not None and job.is_finished:
        console.note(f"{job.run.name}: finished [dim]({seconds:.0f} s)[/dim]")
    elif job.code is not None:
        console.note(f"{job.run.name}: ended with {job.code} after {seconds:.0f} s, see {job.log}")


def _stop(jobs: Sequence[_Job]) -> None:
    """Asks runs to stop, waits, and kills what is left."""
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
