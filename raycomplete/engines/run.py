"""One run of a command: its folder, its cluster and its engines, opened together and passed on as one object."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from raycomplete.attacks.trial import Progress
from raycomplete.config import RunConfig, dump, load_run_file
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import Models, Prompts
from raycomplete.engines.cluster import Cluster, Reservation, ResourcePlan, connect, nodes_of, uses_gpu
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scorers import CACHE_BYTES, TeacherClient
from raycomplete.engines.spec import EngineSpec, object_store_bytes
from raycomplete.engines.weight_transfer import choose_backend
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError, ProcessDiedError, StoppedError
from raycomplete.runtime.files import read_json, write_json, write_text
from raycomplete.runtime.logs import announce_run, begin
from raycomplete.runtime.machine import available_cpus, package_versions
from raycomplete.runtime.signals import Stop, stop
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


@dataclass
class Engines:
    """Running engines; the generator has the weights of `Models.start` at first, scorers stand by role.

    `stats` holds start-up times and parity reports; `reservation` is the scorers' placement group, given back with
    them: what follows training needs the room.
    """

    generator: RolloutPool
    scorers: dict[str, TeacherClient] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    reservation: Reservation | None = None

    def stop_scorers(self) -> None:
        """Ends the scorers, and frees their memory and their placement group."""
        for scorer in self.scorers.values():
            _quietly(scorer.stop)
        if self.reservation is not None:
            _quietly(self.reservation.release)
        self.scorers, self.reservation = {}, None


@dataclass(repr=False)
class Run:
    """Everything that the parts of one run share. A command makes it once, by `open_run`.

    `on_progress` is called after each batch of evaluation trials; `cancelled` is polled between batches and steps, as
    `stop` is. `remote` holds clients of models behind an address, `remote_usage` what asking them has cost.
    """

    config: RunConfig
    folder: Path
    models: Models
    prompts: Prompts
    console: Console
    cluster: Cluster
    stop: Stop = stop
    engines: Engines = field(init=False)  # for as long as they run
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
        parity_sequences: Sequence[tuple[tuple[int, ...], int]] = (),
        scored: Sequence[ModelRole] = ("aligned", "base"),
        cache_bytes: int = CACHE_BYTES,
    ) -> Iterator[Engines]:
        """Places the engines, starts them side by side, waits until each is ready, and ends them on the way out.

        Scorers start only where `parity_sequences` (token ids, number of prompt tokens) are given, which the parity
        gate compares with transformers. `cache_bytes` bounds the scores that one scorer keeps.
        """
        config, cluster, console = self.config, self.cluster, self.console
        timeout_s = config.cluster.start_timeout_s
        spec = EngineSpec.from_config(config, "rollout", self.models.start, use_gpu=cluster.use_gpu)
        num_gpus = sum(node.gpus for node in nodes_of(ray.nodes())) if cluster.use_gpu else 0.0
        backend, why = choose_backend(config, num_gpus=num_gpus, vllm_version=package_versions().get("vllm", ""))
        spec = replace(spec, weight_transfer=backend)
        if cluster.use_gpu and config.rollout.on_policy and not backend:
            console.note(f"New weights reach the rollout engines through the object store: {why}")
        with ExitStack() as ended:
            reservation = Reservation([spec.bundle()] * config.rollout.num_engines, config.cluster.placement)
            ended.callback(_quietly, reservation.release)
            reservation.wait(timeout_s, cluster.table)
            options = RolloutOptions(spec, tuple(sorted(self.models.codec.eos_ids)), config.rollout)
            self.engines = engines = Engines(RolloutPool.start(options, strategies=reservation.strategies()))
            ended.callback(_quietly, engines.generator.stop)
            ended.callback(engines.stop_scorers)
            if parity_sequences:
                requests = [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in parity_sequences]
                self._start_scorers(scored, requests, cache_bytes)
            names = ", ".join(["generator", *(f"{role} scorer" for role in engines.scorers)])
            device = "GPU" if cluster.use_gpu else f"{available_cpus()} CPU cores"
            with console.stage(f"Engines started: {names} ({device})"):
                engines.stats["generator"] = engines.generator.wait_until_ready(timeout_s)
                for name, scorer in engines.scorers.items():
                    engines.stats[name] = scorer.wait_until_ready(timeout_s)
            for name in engines.scorers:
                parity = engines.stats[name]["parity"]
                console.note(
                    f"Parity of {name}: rebuilt log-probabilities within {parity['mean_expected_difference']:.2g} nats "
                    f"of transformers' on {parity['num_rows']} tokens [dim](tolerance {parity['tolerance']:.2g})[/dim]"
                )
            yield engines

    def _start_scorers(self, roles: Sequence[ModelRole], requests: list[ScoreRequest], cache_bytes: int) -> None:
        """Adds the scorers of all roles to the engines, in one placement group."""
        config, heads, use_gpu = self.config, self.models.heads, self.cluster.use_gpu
        replicas = config.teacher.replicas
        specs = [EngineSpec.from_config(config, "scorer", heads[role].path, use_gpu=use_gpu) for role in roles]
        bundles = [spec.bundle() for spec in specs for _ in range(replicas)]
        reservation = self.engines.reservation = Reservation(bundles, config.cluster.placement)
        reservation.wait(config.cluster.start_timeout_s, self.cluster.table)
        strategies = reservation.strategies()
        for index, (role, spec) in enumerate(zip(roles, specs, strict=True)):
            self.engines.scorers[role] = TeacherClient.start(
                role,
                heads[role],
                spec,
                config.teacher,
                requests,
                strategies=strategies[index * replicas : (index + 1) * replicas],
                record_folder=(config.output.folder / "quarantined").resolve(),
                cache_bytes=cache_bytes,
            )


def start_engine(config: RunConfig, path: Path, codec: ChatCodec) -> RolloutPool:
    """Asks Ray for one generating engine of a model that is not the run's generator: attacker, judge or chat.

    Returns at once; `wait_until_ready` waits for the engine.
    """
    spec = EngineSpec.from_config(config, "single", path, use_gpu=uses_gpu(config.cluster))
    rollout = config.rollout.model_copy(update={"num_engines": 1, "tensor_parallel": 1, "colocated": False})
    return RolloutPool.start(RolloutOptions(spec, tuple(sorted(codec.eos_ids)), rollout))


@dataclass(frozen=True)
class OutputFolder:
    """The run folder of a command, and the rules by which it may be used again.

    A resumed run must have the same values in the sections `same`, except for the keys `free`, and the same `inputs`
    (fingerprints of checkpoints and prompts by name). `keep_config` leaves a config.yaml that is there as it is.
    """

    config: RunConfig
    same: tuple[str, ...]
    resume: bool = False
    overwrite: bool = False
    keep_config: bool = False
    free: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder itself, which need not exist yet."""
        return self.config.output.folder

    @property
    def way_on(self) -> str:
        """Says how a command that was stopped goes on."""
        return "The same command goes on." if self.keep_config else "Go on with --resume."

    def check(self) -> dict[str, str]:
        """Refuses a folder that `open` would refuse, writes nothing, and returns the versions of packages.

        From here on logs and metrics of all processes bear the run's name.
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
        """Creates the folder, or opens it again, and writes settings, input fingerprints and versions.

        `revisions` are commits of data sets of the hub, which stand beside the versions of packages.
        """
        versions = self.check()
        folder, settings = self.path, self.path / "config.yaml"
        if self.overwrite and not self.resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.keep_config and settings.is_file()):
            write_text(settings, dump(self.config))
        if self.inputs:
            known = read_json(folder / "inputs.json") or {}
            write_json(folder / "inputs.json", dict(self.inputs) | known)  # an earlier version's record may lack some
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
        known = read_json(self.path / "inputs.json") or {}
        if differ := [name for name, content in self.inputs.items() if known.get(name, content) != content]:
            raise ConfigError(
                f"Since the run in {self.path} was started, the content of these changed: {', '.join(differ)}.",
                "Run again with --overwrite, or choose another output.name.",
            )

    def _compared(self, config: RunConfig) -> dict[str, Any]:
        """Returns the values that must not change, by section or by key where a section has free keys."""
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
    """Connects to the cluster, opens the run folder, and leaves the cluster as it was found.

    Refuse everything else that can be refused before this: it is the first thing that costs seconds and writes files.
    A signal ends the block with a StoppedError that says where, and how to go on.
    """
    folder.check()
    config, dtype = folder.config, folder.config.models.weight_dtype
    count = count_parameters(models.paths["student"]) if "student" in models.paths else 0
    joined = connect(config.cluster, plan, console, object_store_bytes(config, count, dtype))
    with joined as cluster, _told(folder, console):
        console.note(f"Weights are {dtype} (models.dtype)")
        for note in (*models.notes, *prompts.notes):
            console.note(note)
        path = folder.open(prompts.revisions)
        yield Run(config, path, models, prompts, console, cluster, on_progress=on_progress, cancelled=cancelled)


@contextmanager
def _told(folder: OutputFolder, console: Console) -> Iterator[None]:
    """Turns what a signal did to a run into one sentence with the way on."""
    try:
        yield
    except (StoppedError, ProcessDiedError) as error:  # a signal to the whole group ends actors, too
        if not stop.requested:
            raise
        where = f" during {console.stage_title!r}" if console.stage_title else ""
        problem = error.problem if type(error) is StoppedError else f"Stopped on request{where}; what was done is kept."
        raise StoppedError(problem, folder.way_on) from error


def _quietly(end: Callable[[], None]) -> None:
    with suppress(Exception):  # an actor that is gone already must not hide why
        end()
