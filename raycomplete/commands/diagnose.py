"""Diagnosis: where alignment stopped, by position. Needs a base and an aligned checkpoint, and trains nothing.

    refusal_tokens.json  ->  partitions/, tokens/  ->  gradient.json  ->  evaluation/  ->  diagnosis.json, report.html

Everything lies in `<root>/<name>-diagnosis/`, beside the run of that name, whose student is shown where there is one.
A part whose result is there is not made again, so `--resume` continues an interrupted diagnosis where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig
from raycomplete.data.inputs import Models, prepare_models
from raycomplete.data.stream import content_key, partition_metadata, partitions, read_partition
from raycomplete.diagnosis.baseline import contrastive_baseline
from raycomplete.diagnosis.engines import find_refusal_tokens, make_walk, start_diagnosis_engines
from raycomplete.diagnosis.gradient import exact_gradient, gradient_signal, preference_pairs
from raycomplete.diagnosis.partitions import Walk, measure_partition, samples_of, write_measured
from raycomplete.diagnosis.samples import KINDS, Sample, partition_samples, read_prompts
from raycomplete.diagnosis.summary import kind_summary, token_table
from raycomplete.engines.cluster import Cluster, connect
from raycomplete.engines.placement import plan_run
from raycomplete.engines.run import OutputFolder
from raycomplete.engines.start import Engines
from raycomplete.evaluation.judges import default_judge
from raycomplete.report.diagnosis import depth_words
from raycomplete.report.html import write_report
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, WorkError
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.types import Judge, ModelRole, Prompt

_SAME = ("models", "data", "rollout")  # sections that decide what is measured
# Keys of `diagnose` that only concern what is made from the partitions, or how fast; they may change on --resume.
_FREE_KEYS = {"gradient", "gradient_prompts", "full_prompts", "gradient_tokens", "beta", "threshold", "replicates"} | {
    "table_tokens",
    "show_harmful",
    "in_flight",
    "contrastive",
}
_INTERVALS = (
    "means: Student's t over prompts, pointwise; completion depth: percentiles of a Poisson bootstrap over prompts"
)


@dataclass(frozen=True)
class _Job:
    """What the parts of a diagnosis share."""

    config: RunConfig
    models: Models
    judge: Judge
    engines: Engines
    folder: Path
    console: Console


@stored("-diagnosis")
def diagnose(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Measures where alignment stopped.

    Args:
        config: Run file; needs `models.base`, `models.aligned` and prompts.
        resume: Continue an interrupted diagnosis.
        overwrite: Replace an earlier diagnosis of this name.
        console: Where progress goes.

    Returns:
        The folder with `diagnosis.json`, `report.html`, `figures/` and the partitions.

    Raises:
        RefusedError: Something is wrong with the run file, the checkpoints or the prompts; nothing was written.
        WorkError: Something failed on the way; finished partitions are kept.
    """
    console = console or Console()
    started = time.perf_counter()
    config = _of_diagnosis(config)
    roles: tuple[ModelRole, ...] = (
        ("base", "aligned") if config.models.student is None else ("base", "aligned", "student")
    )
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(config, roles)
        first = {kind: list(islice(read_prompts(config, kind), config.diagnose.partition_prompts)) for kind in KINDS}
    claimed = OutputFolder(config, same=_SAME, resume=resume, overwrite=overwrite)
    claimed.check()
    judge = default_judge(config.data.source)
    with connect(config.cluster, plan_run(config, scorers=roles), console) as cluster:
        folder = claimed.open()
        _check_same_inputs(folder, config, models)
        console.note(f"Folder of the diagnosis: {folder}")
        with start_diagnosis_engines(
            config, cluster, models, console, list(chain(*zip(*first.values(), strict=False)))
        ) as engines:
            job = _Job(config, models, judge, engines, folder, console)
            walk = make_walk(engines, models, config, _refusal_tokens(job, first["harmful"]))
            names = {kind: _measure_kind(job, walk, kind) for kind in KINDS}
            found = _summary(job, walk, names, time.perf_counter() - started)
            _publish(job, found)
            console.note(f"First pictures: {folder / 'report.html'}")
            found["gradient"] = _gradient(job, walk, first["harmful"])
            if config.diagnose.contrastive.evaluate:
                _add_baseline(job, cluster, found)
    found["seconds"] = time.perf_counter() - started
    _publish(job, found)
    _print_result(found, folder, console)
    return folder


def _of_diagnosis(config: RunConfig) -> RunConfig:
    """The same run file with its own folder, and with the student that is to be diagnosed."""
    trained = config.output.folder / "student"
    student = config.diagnose.student or (str(trained) if (trained / "config.json").is_file() else None)
    output = config.output.renamed("-diagnosis")
    models = config.models.model_copy(update={"student": student})
    return config.model_copy(update={"output": output, "models": models})


def _check_same_inputs(folder: Path, config: RunConfig, models: Models) -> None:
    """A resumed diagnosis must go on with the checkpoints and settings it started with."""
    settings = config.diagnose.model_dump(mode="json", exclude=_FREE_KEYS)
    inputs = {f"models.{role}": models.fingerprint(role) for role in models.paths}
    inputs |= {f"diagnose.{key}": value for key, value in settings.items()}
    known = read_json(folder / "inputs.json")
    if known is None:
        write_json(folder / "inputs.json", inputs)
    elif known != inputs:
        changed = ", ".join(sorted(name for name in known | inputs if known.get(name) != inputs.get(name)))
        raise ConfigError(
            f"Since the diagnosis in {folder} was started, these changed: {changed}.",
            "Run again with --overwrite, or choose another output.name.",
        )


def _refusal_tokens(job: _Job, harmful: Sequence[Prompt]) -> list[int]:
    file = job.folder / "refusal_tokens.json"
    known = read_json(file)
    if known is None:
        walk = make_walk(job.engines, job.models, job.config, ())
        longest = job.config.models.max_length - 1
        fitting = [prompt for prompt in harmful if len(job.models.codec.encode_prompt(prompt.text)) <= longest]
        ids = find_refusal_tokens(walk, job.models.codec, fitting)
        known = {"ids": ids, "tokens": [job.models.codec.decode([token]) for token in ids]}
        write_json(file, known)
    job.console.note(f"Refusal tokens: {', '.join(map(repr, known['tokens'])) or 'none found'}")
    return list(known["ids"])


def _measure_kind(job: _Job, walk: Walk, kind: Any) -> list[str]:
    """Measures every partition that is not there yet; returns the names of all of them in order."""
    settings = job.config.diagnose
    base = job.engines.generator.with_weights(str(job.models.paths["base"]))
    names: list[str] = []
    done = 0
    with job.console.progress(f"Walk over {kind} prompts", settings.num_prompts or 0) as advance:
        for number, prompts in enumerate(partitions(read_prompts(job.config, kind), settings.partition_prompts)):
            name, key = f"{kind}-{number:05d}", content_key(prompts)
            names.append(name)
            stats = partition_metadata(job.folder / "partitions" / f"{name}.parquet")
            if stats is None:
                started = time.perf_counter()
                samples = partition_samples(job.config, job.models.codec, base, job.judge, kind, prompts, number)
                sampled_s = time.perf_counter() - started
                rows, tokens = measure_partition(walk, samples)
                stats = {
                    "key": key,
                    "prompts": len(prompts),
                    "measured": len(samples),
                    "measured_ids": [sample.prompt_id for sample in samples],
                    "policies": list(walk.policies),
                    "sampled_s": sampled_s,
                    "measured_s": time.perf_counter() - started - sampled_s,
                    "read_tokens": sum(len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples),
                }
                write_measured(job.folder, name, rows, tokens, stats)
            elif stats["key"] != key:
                raise ConfigError(
                    f"The {kind} prompts of partition {number} changed since the diagnosis was started.",
                    "Run again with --overwrite, or choose another output.name.",
                )
            done += len(prompts)
            advance(done, f"{done} prompts")
    return names


def _summary(job: _Job, walk: Walk, names: dict[Any, list[str]], seconds: float) -> dict[str, Any]:
    settings = job.config.diagnose
    kinds = {str(kind): kind_summary(job.folder, found, walk.policies, settings) for kind, found in names.items()}
    if not kinds["harmful"]["measured"]:
        raise WorkError(
            f"None of {kinds['harmful']['prompts']} harmful prompts has a compliant continuation.",
            "Name an answer column, or set rollout.affirmative_prefix; then run again with --overwrite.",
        )
    stats = [partition_metadata(job.folder / "partitions" / f"{name}.parquet") or {} for name in chain(*names.values())]
    measured_s, read = (sum(fact.get(key, 0.0) for fact in stats) for key in ("measured_s", "read_tokens"))
    return {
        "name": job.config.output.name,
        "policies": list(walk.policies),
        "models": {str(role): job.models.fingerprint(role) for role in job.models.paths},
        "settings": settings.model_dump(mode="json"),
        "intervals": _INTERVALS,
        "refusal_tokens": (read_json(job.folder / "refusal_tokens.json") or {}).get("tokens", []),
        "kinds": kinds,
        "tokens": token_table(job.folder, names, walk.policies, job.models.codec, settings),
        "gradient": None,
        "contrastive": None,
        "measured_s": measured_s,
        "tokens_per_s": read / measured_s if measured_s else None,
        "seconds": seconds,
        "versions": read_json(job.folder / "environment.json"),
    }


def _gradient(job: _Job, walk: Walk, harmful: Sequence[Prompt]) -> dict[str, Any] | None:
    """gradient.json, made anew where its settings changed; None where it is off or aligned refuses nothing."""
    settings = job.config.diagnose
    if settings.gradient == "off":
        return None
    names = ("gradient", "gradient_prompts", "full_prompts", "gradient_tokens", "beta")
    made_from = {name: getattr(settings, name) for name in names}
    file = job.folder / "gradient.json"
    known = read_json(file)
    if known is not None and known["made_from"] == made_from:
        return known
    aligned = job.engines.generator.with_weights(str(job.models.paths["aligned"]))
    by_id = {prompt.prompt_id: prompt for prompt in harmful}
    with job.console.stage("Gradient of safety losses by position"):
        samples = _stored_samples(job, by_id)
        pairs = preference_pairs(settings, job.models.codec, aligned, job.judge, by_id, samples)
        if len(pairs) < 2:
            job.console.note(f"No gradient: of {len(samples)} harmful prompts aligned refuses {len(pairs)}")
            return None
        signal = gradient_signal(walk, pairs, settings)
        if settings.gradient == "full":
            signal = exact_gradient(
                {str(role): path for role, path in job.models.paths.items()}, pairs, signal, settings
            )
    signal = {**signal, "made_from": made_from}
    write_json(file, signal)
    return signal


def _stored_samples(job: _Job, prompts: dict[str, Prompt]) -> list[Sample]:
    """The responses of the first harmful partition, as they were measured."""
    file = job.folder / "partitions" / "harmful-00000.parquet"
    rows, stats = read_partition(file), partition_metadata(file)
    assert stats is not None
    encode = job.models.codec.encode_prompt
    return [
        Sample(name, tuple(encode(prompts[name].text)), tuple(rows["token_id"][where].tolist()))
        for name, where in (
            (stats["measured_ids"][prompt], where)
            for prompt, role, where in (samples_of(rows) if rows else ())
            if role == 0
        )
    ]


def _add_baseline(job: _Job, cluster: Cluster, found: dict[str, Any]) -> None:
    baseline = contrastive_baseline(job.config, cluster, job.models, job.engines, job.folder, job.console)
    rates = {role: {"asr": result["asr"], "utility": result["utility"]} for role, result in baseline["results"].items()}
    settings = job.config.diagnose.contrastive.model_dump(mode="json")
    found["contrastive"] = {"settings": settings, "cost": baseline["cost"], "rates": rates}


def _publish(job: _Job, found: dict[str, Any]) -> None:
    write_json(job.folder / "diagnosis.json", found)
    write_report(job.folder)


def _print_result(found: dict[str, Any], folder: Path, console: Console) -> None:
    """The closing lines: one number a model, and where the pictures are."""
    lines: list[tuple[str, Any]] = []
    for kind, summary in found["kinds"].items():
        lines.append((f"{kind} prompts", f"{summary['measured']} measured of {summary['prompts']}"))
        for role, depth in summary["completion_depth"].items():
            lines.append((f"completion depth of {role}, {kind}", depth_words(depth)))
    if found["contrastive"] is not None:
        lines.append(
            ("contrastive decoding costs", f"{found['contrastive']['cost']['cost_ratio']:.2f} x plain decoding")
        )
    lines += [("time", f"{found['seconds']:.0f} s"), ("report", folder / "report.html")]
    console.panel(lines)
