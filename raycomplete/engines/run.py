"""One run of a command: its folder, its cluster and its engines, opened together and passed on as one object."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raycomplete.attacks.trial import Progress
from raycomplete.config import RunConfig, dump, load_run_file
from raycomplete.data.inputs import Models, Prompts
from raycomplete.engines.cluster import Cluster, ResourcePlan, connect
from raycomplete.engines.spec import object_store_bytes
from raycomplete.engines.start import Engines, start_engines
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, ProcessDiedError, StoppedError
from raycomplete.runtime.files import write_json, write_text
from raycomplete.runtime.logs import announce_run, begin
from raycomplete.runtime.machine import package_versions
from raycomplete.runtime.signals import StopSignals, stop_signals
from raycomplete.runtime.types import Generator, Judge, ModelRole
from raycomplete.training.checkpoints import count_parameters

# Keys that may differ between a run and its resumption: where and for how long, and how much memory. None of them
# changes what is computed.
_FREE_KEYS = {
    "train": {
        "checkpoint_every",
        "keep_checkpoints",
        "max_failures",
        "per_device_batch_size",
        "gradient_checkpointing",
    },
    "rollout": {"gpu_memory_utilization"},
}


@dataclass(repr=False)
class Run:
    """Everything that the parts of one run share.

    A command makes it once, by `open_run`, and hands it to sampling, training, evaluation and diagnosis.

    Attributes:
        config: Run file.
        folder: Run folder; it exists and holds config.yaml and environment.json.
        models: Checkpoints by role. `use_student` puts the trained student in its place.
        prompts: Training and held-out prompts.
        console: Where progress is shown.
        cluster: The Ray cluster that the run is connected to.
        stop: Signals that asked the run to stop.
        engines: Running engines; set by `start_engines` for as long as they run.
        on_progress: Called after each batch of evaluation trials, in the thread of the evaluation.
        cancelled: Asked between batches and steps; True ends the run, beside the signals of `stop`.
        remote: Clients of the models behind an address, in an evaluation.
        remote_usage: How often such models were asked and what that cost, in earlier starts too, by who they are,
            attackers among them.
    """

    config: RunConfig
    folder: Path
    models: Models
    prompts: Prompts
    console: Console
    cluster: Cluster
    stop: StopSignals = field(default_factory=StopSignals)
    engines: Engines = field(init=False)
    on_progress: Callable[[Progress], None] | None = None
    cancelled: Callable[[], bool] | None = None
    remote: Mapping[ModelRole, Generator] = field(default_factory=dict)
    remote_usage: dict[str, Any] = field(default_factory=dict)

    def generator(self, role: ModelRole) -> Generator:
        """Returns what generates with a model: an engine, or the client of its address."""
        return self.remote.get(role) or self.engines.generator.with_weights(str(self.models.paths[role]))

    @property
    def judge(self) -> Judge:
        """The judge that fits the prompts; `evaluation.judge` may name another for the evaluation."""
        return default_judge(self.config.data.source)

    def is_stopping(self) -> bool:
        """Tells work that can go on later that it should end now."""
        return self.stop.requested or (self.cancelled is not None and self.cancelled())

    def use_student(self, path: Path) -> None:
        """Puts a trained checkpoint in the student's place."""
        self.models = replace(self.models, paths={**self.models.paths, "student": path})

    @contextmanager
    def start_engines(
        self,
        *,
        parity_sequences: list[tuple[tuple[int, ...], int]] | None = None,
        scored: tuple[ModelRole, ...] = ("aligned", "base"),
    ) -> Iterator[Engines]:
        """Starts the engines of the run, sets `engines`, and stops them on the way out.

        Args and errors are those of `raycomplete.engines.start.start_engines`.
        """
        with start_engines(
            self.config,
            self.cluster,
            self.models,
            self.console,
            parity_sequences=parity_sequences or (),
            scored=scored,
        ) as engines:
            self.engines = engines
            yield engines


@dataclass(frozen=True)
class OutputFolder:
    """The run folder of a command, and the rules by which it may be used again.

    Attributes:
        config: Resolved run file; written as config.yaml.
        same: Sections that must be the same to continue what is there.
        resume: Continue what is there; it must come from the same settings.
        overwrite: Remove an earlier run first.
        keep_config: Leave a config.yaml that is there as it is.
        free: Keys of the sections `same` that may differ all the same, as `models.max_length`.
    """

    config: RunConfig
    same: tuple[str, ...]
    resume: bool = False
    overwrite: bool = False
    keep_config: bool = False
    free: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder itself, which need not exist yet."""
        return self.config.output.folder

    @property
    def way_on(self) -> str:
        """Says how a command that was stopped goes on."""
        return "The same command goes on." if self.keep_config else "Go on with --resume."

    def check(self) -> dict[str, str]:
        """Refuses a folder that `open` would refuse, before anything is started, and writes nothing.

        From here on logs and metrics of all processes bear the run's name.

        Returns:
            Versions of the packages that the run will use.

        Raises:
            ConfigError: The folder holds a run and neither `resume` nor `overwrite` is set, or it was made with other
                settings.
            SetupError: vLLM is not installed.
        """
        folder, settings = self.path, self.path / "config.yaml"
        if settings.is_file():
            if self.resume:
                self._check_same(load_run_file(settings, sections={"models", "data", "rollout", *self.same}))
            elif not self.overwrite:
                raise ConfigError(
                    f"The run folder {folder} holds a run already.",
                    "Add --resume to continue it or --overwrite to replace it, or choose another output.name.",
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"The folder {folder} is not empty and holds no run.", "Choose another output.name.")
        announce_run(self.config.output.name, folder)
        return package_versions()

    def open(self, revisions: Mapping[str, str] | None = None) -> Path:
        """Creates the folder, or opens it again, and writes its files of settings and versions.

        Args:
            revisions: Commit of each data set of the hub, which stands beside the versions of packages.

        Raises:
            ConfigError: See `check`.
            SetupError: See `check`.
        """
        versions = self.check()
        folder, settings = self.path, self.path / "config.yaml"
        if self.overwrite and not self.resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.keep_config and settings.is_file()):
            write_text(settings, dump(self.config))
        write_json(folder / "environment.json", {**versions, **(revisions or {})})
        begin("driver")
        return folder

    def _check_same(self, before: RunConfig) -> None:
        old, new = self._compared(before), self._compared(self.config)
        # A key that is free in one of the two only, since rollout.on_policy differs, is missing from the other.
        changed = sorted(name for name in old if name in new and old[name] != new[name])
        if changed:
            dtype, present = before.models.dtype, self.config.models.dtype
            was = f" (models.dtype was {dtype}, and is {present} now)" if dtype != present else ""  # auto, elsewhere
            raise ConfigError(
                f"The run in {self.path} was started with other values of {', '.join(changed)}{was}.",
                f"Resume with the same run file and overrides{f', and models.dtype={dtype}' if was else ''}, or choose "
                "another output.name.",
            )

    def _compared(self, config: RunConfig) -> dict[str, Any]:
        """Values that must not change, by section or by key where a section has free keys."""
        found: dict[str, Any] = {}
        for section, values in config.model_dump(mode="json", include=set(self.same)).items():
            free = {key.partition(".")[2] for key in self.free if key.startswith(f"{section}.")}
            free |= _FREE_KEYS.get(section, set())
            if not free:
                found[section] = values
                continue
            if config.rollout.on_policy:  # the rollout engines get weights at every checkpoint
                free = free - {"checkpoint_every"}
            found |= {f"{section}.{key}": value for key, value in values.items() if key not in free}
        return found


@contextmanager
def open_run(
    folder: OutputFolder,
    models: Models,
    prompts: Prompts,
    plan: ResourcePlan,
    console: Console,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Run]:
    """Connects to the cluster, handles signals, opens the run folder, and leaves the cluster as it was found.

    Refuse everything else that can be refused before this: it is the first thing that costs seconds and writes files.

    Args:
        folder: Run folder, with the run file in it.
        models: From `raycomplete.data.inputs.prepare_models`.
        prompts: From `raycomplete.data.inputs.prepare_prompts`.
        plan: Resources that the run places (`raycomplete.engines.cluster.plan_run`).
        console: Where progress is shown.
        on_progress: See `Run`.
        cancelled: See `Run`.

    Raises:
        ConfigError: The folder cannot be used; see `OutputFolder.check`.
        SetupError: The cluster cannot be reached, or is smaller than the run needs.
        StoppedError: A signal stopped the run; the message says where, and how to go on.
    """
    folder.check()
    config, dtype = folder.config, folder.config.models.weight_dtype
    count = count_parameters(models.paths["student"]) if "student" in models.paths else 0
    joined = connect(config.cluster, plan, console, object_store_bytes(config, count, dtype))
    with joined as cluster, stop_signals() as stop, _told(stop, folder, console):
        console.note(f"Weights are {dtype} (models.dtype)")
        for note in (*models.notes, *prompts.notes):
            console.note(note)
        yield Run(
            config=config,
            folder=folder.open(prompts.revisions),
            models=models,
            prompts=prompts,
            console=console,
            cluster=cluster,
            stop=stop,
            on_progress=on_progress,
            cancelled=cancelled,
        )


@contextmanager
def _told(stop: StopSignals, folder: OutputFolder, console: Console) -> Iterator[None]:
    """Turns what a signal did to a run into one sentence with the way on."""
    try:
        yield
    except (KeyboardInterrupt, StoppedError, ProcessDiedError) as error:  # a signal to the whole group ends actors, too
        if not stop.requested:
            raise
        where = f" during {console.stage_title!r}" if console.stage_title else ""
        problem = error.problem if type(error) is StoppedError else f"Stopped on request{where}; what was done is kept."
        raise StoppedError(problem, folder.way_on) from error
