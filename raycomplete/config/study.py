"""A study: one run file trained by several methods under several seeds, and evaluated in one way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from raycomplete.config.loading import apply_override, explained, merged, parse, read_tree, shared_settings
from raycomplete.config.run import OutputConfig, RunConfig
from raycomplete.methods.registry import METHODS
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.plugins import load_plugins, located
from raycomplete.runtime.section import Section

Tree = dict[str, Any]
_OF_METHODS = ("method", "rollout", "teacher", "train")  # sections that an entry of `methods` may change


class StudyConfig(Section):
    """A study file. Entries of `models`, `methods` and `defences` are named, and hold what they change."""

    run: Path = Field(description="the run file that all runs start from, relative to the study file")
    settings: Tree = Field(default_factory=dict, description="sections of the run file, laid over it for every run")
    models: dict[str, Tree | None] = Field(
        default_factory=dict,
        description="by name, sections of the run file that make it another model's; absent: the run file's own",
    )
    methods: dict[str, Tree | None] = Field(
        min_length=1,
        description="by name, sections of the run file (method, train, rollout, teacher) laid over it; a name of a "
        "training method needs no method.name",
    )
    defences: dict[str, Tree] = Field(
        default_factory=dict, description="by name, evaluation.defence around the aligned model, which trains nothing"
    )
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1, description="values of train.seed")
    parallel: int | None = Field(
        None, ge=1, description="runs at a time; as many as fit on the cluster when absent, one where it is started"
    )
    plugins: list[Path] = Field(
        default_factory=list, description="Python files that add methods, relative to the study file, or modules"
    )
    output: OutputConfig = Field(default_factory=lambda: OutputConfig(name="study"))

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("names a seed twice")
        return seeds


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: `label` on `model` under `seed`, which is None for what draws nothing at random."""

    model: str
    label: str
    seed: int | None
    config: RunConfig
    trains: bool  # not the frozen models by themselves, and no defence at inference
    departures: tuple[str, ...] = ()  # from the method's authors, and from the reference's samples and validation
    inputs: Mapping[str, str] = field(default_factory=dict)  # fingerprints of checkpoints and prompts by name
    store_bytes: int = 0  # Ray's object store that it needs by itself

    @property
    def name(self) -> str:
        """Names the run in messages."""
        return f"{self.model}, {self.label}" + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True)
class Study:
    """A study file and the runs that come of it: first the frozen models of each, then methods, then defences."""

    config: StudyConfig
    runs: tuple[StudyRun, ...]

    @property
    def folder(self) -> Path:
        """Folder of all runs and of the results."""
        return self.config.output.folder

    @property
    def reference(self) -> str:
        """Label of the first method, which is compared with each of the others."""
        return next(iter(self.config.methods))


BASE = "base"
FROZEN = "aligned"
"""Label of the run that evaluates base and aligned, whose answers all other runs of the model share."""


def load_study(path: Path, overrides: Iterable[str] = ()) -> Study:
    """Reads a study file and the run file of every run, so that a mistake in any is refused before the first starts."""
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        config = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explained(error, tree, StudyConfig)}") from error
    folder = path.parent.resolve()
    config = config.model_copy(update={"plugins": [located(plugin, folder) for plugin in config.plugins]})
    load_plugins(config.plugins)
    file = folder / config.run
    base = merged(read_tree(file), config.settings)
    of_run = [located(Path(plugin), file.parent) for plugin in base.get("plugins") or []]
    base["plugins"] = [str(plugin) for plugin in (*of_run, *config.plugins)]
    base["evaluation"] = {key: value for key, value in (base.get("evaluation") or {}).items() if key != "defence"}
    models = config.models or {(base.get("output") or {}).get("name", "model"): {}}
    root = config.output.folder.resolve()
    runs: list[StudyRun] = []
    for model, changes in models.items():
        own = merged(base, changes or {})
        planned: list[tuple[str, Tree, int | None]] = [(FROZEN, own, None)]
        for label, entry in config.methods.items():
            trained = _of_method(own, label, entry or {}, path)
            planned += [(label, merged(trained, {"train": {"seed": seed}}), seed) for seed in config.seeds]
        for label, defence in config.defences.items():
            planned.append((label, merged(own, {"evaluation": {"defence": defence}}), None))
        for label, settings, seed in planned:
            name = _slug(label) + ("" if seed is None else f"-seed{seed}")
            whole = merged(settings, {"output": {"root": str(root / _slug(model)), "name": name}})
            run = parse(whole, f"{path}, {label}", file.parent, plugins=True)
            if (storage := config.output.storage or run.output.storage) is not None:
                apart = {"output": {"storage": _storage_of(config.output.name, _slug(model), storage)}}
                run = parse(merged(whole, apart), f"{path}, {label}", file.parent, plugins=True)
            runs.append(StudyRun(model, label, seed, run, trains=seed is not None))
    _check_names(path, config, runs)
    study = Study(config, tuple(runs))
    standard = {run.model: run.config for run in runs if run.label == study.reference}
    told = [tuple(departures(run.config, standard[run.model])) if run.trains else () for run in runs]
    return replace(study, runs=tuple(replace(run, departures=some) for run, some in zip(runs, told, strict=True)))


def _of_method(own: Tree, label: str, entry: Tree, path: Path) -> Tree:
    """Lays an entry of `methods` over the run file; another method takes those of its settings that all have."""
    if unknown := [name for name in entry if name not in _OF_METHODS]:
        raise ConfigError(
            f"{path}: methods.{label} changes {', '.join(unknown)}, and an entry may change {', '.join(_OF_METHODS)}.",
            "Put what all runs share under settings, and models and data under models.",
        )
    method = dict(own.get("method") or {})
    given = dict(entry.get("method") or {})
    before = method.get("name", "completion")
    name = given.setdefault("name", label if label in METHODS else before)
    if name != before:
        method = shared_settings(method)
    return merged({**own, "method": method}, {**entry, "method": given})


def _storage_of(study: str, model: str, storage: str) -> str | None:
    """Place of a model's runs in a storage, `<storage>/<study>/<model>`: runs of many models have the same names."""
    above = OutputConfig.model_construct(name=study, storage=storage).mirror
    return OutputConfig.model_construct(name=model, storage=above).mirror


def _check_names(path: Path, config: StudyConfig, runs: list[StudyRun]) -> None:
    folders = [run.config.output.folder for run in runs]
    if twice := next((run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1), None):
        words = f"{path}: two entries would write into the folder {twice.config.output.folder}."
        raise ConfigError(words, f"Give {twice.label!r} another name; {FROZEN!r} is that of the frozen models.")
    labels = [*config.methods, *config.defences]
    if taken := next((label for label in labels if label in (BASE, FROZEN) or labels.count(label) > 1), None):
        raise ConfigError(
            f"{path}: two rows of the table would be called {taken!r}.",
            f"Give the method or the defence another name; {BASE!r} and {FROZEN!r} are those of the frozen models.",
        )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "run"


def departures(config: RunConfig, reference: RunConfig) -> list[str]:
    """Lists in words where a run departs from its method's authors, and from the reference's samples and validation."""
    method = config.method
    found = [
        f"{key} {value} instead of {default}"
        for key, value, default in _differing("method", method, type(method)(name=method.name))
        if key != "method.depth.schedule" or method.depth_term is not None  # without a term depths are drawn evenly
    ]
    trained = [(key, reduce(getattr, key.split("."), config), theirs) for key, theirs in method.published]
    found += [f"{key} {value} instead of {theirs}" for key, value, theirs in trained if value != theirs]
    beside = _differing("rollout", config.rollout, reference.rollout)
    beside += _differing("train.validation", config.train.validation, reference.train.validation)
    found += [f"{key} {value} instead of the reference's {other}" for key, value, other in beside]
    return [*method.departures, *found]


def _differing(key: str, ours: Section, theirs: Section) -> list[tuple[str, Any, Any]]:
    found = []
    for name in type(ours).model_fields:
        value, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(value, Section) and type(value) is type(other):
            found += _differing(f"{key}.{name}", value, other)
        elif value != other:
            found.append((f"{key}.{name}", value, other))
    return found
