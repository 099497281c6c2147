"""The engines of a run: scorers and rollout engines, placed and started together, and stopped together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.inputs import Models
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.payload import ScoreRequest
from raycomplete.engines.placement import Reservation, engine_row
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.scorers import ScorerOptions, TeacherClient
from raycomplete.engines.spec import engine_environment
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import ModelRole


@dataclass
class Engines:
    """Running engines.

    Attributes:
        generator: Generates with base's weights at first; `generator.with_weights(path)` with others.
        scorers: By role; empty where only text is needed.
        stats: Start-up times and parity reports, for the run folder.
        places: Of the scorers, given back with them: what comes after training needs the room.
    """

    generator: RolloutPool
    scorers: dict[str, TeacherClient] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    places: Reservation | None = None

    def stop_scorers(self) -> None:
        """Frees the scorers' memory and their places."""
        for scorer in self.scorers.values():
            with suppress(Exception):  # an actor that is gone already must not hide why
                scorer.stop()
        self.scorers = {}
        if self.places is not None:
            with suppress(Exception):
                self.places.release()
        self.places = None


@contextmanager
def start_engines(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    console: Console,
    *,
    parity_sequences: Sequence[tuple[tuple[int, ...], int]] = (),
    scored: Sequence[ModelRole] = ("aligned", "base"),
    first: ModelRole = "base",
) -> Iterator[Engines]:
    """Places the engines, starts them side by side, waits until each is ready, and ends them on the way out.

    Args:
        config: Run file.
        cluster: Where to place them.
        models: Checkpoints.
        console: Told what is waited for.
        parity_sequences: (token ids, prompt tokens) that scorers are proved on; none starts no scorers.
        scored: Frozen models that are scored.
        first: Whose weights the generator holds at first.

    Raises:
        WaitTimeoutError: An engine has no place, or is not ready, within `cluster.start_timeout_s`.
        ProcessDiedError: An engine died while it started.
    """
    timeout_s = config.cluster.start_timeout_s
    with ExitStack() as ended:
        engines = _start_generator(config, cluster, models, first, ended)
        ended.callback(engines.stop_scorers)
        if parity_sequences:
            _start_scorers(config, cluster, models, engines, scored, parity_sequences)
        names = ", ".join(["generator", *(f"{role} scorer" for role in engines.scorers)])
        with console.stage(
            f"Engines started: {names} ({'GPU' if cluster.use_gpu else f'{available_cpus()} CPU cores'})"
        ):
            engines.stats["generator"] = engines.generator.wait_until_ready(timeout_s)
            for name, scorer in engines.scorers.items():
                engines.stats[name] = scorer.wait_until_ready(timeout_s)
        for name in engines.scorers:
            parity = engines.stats[name]["parity"]
            console.note(
                f"Parity of {name}: rebuilt log-probabilities within {parity['mean_expected_difference']:.2g} nats of "
                f"transformers' on {parity['num_rows']} tokens [dim](tolerance {parity['tolerance']:.2g})[/dim]"
            )
        yield engines


def _start_generator(
    config: RunConfig, cluster: Cluster, models: Models, first: ModelRole, ended: ExitStack
) -> Engines:
    """A engines of rollout engines; `ended` stops them and gives their places back."""
    rollout, settings = config.rollout, config.models
    row = engine_row(config.cluster, "rollout engine", rollout.num_engines, tensor_parallel=rollout.tensor_parallel)
    places = Reservation([row.bundle(use_gpu=cluster.use_gpu)] * row.replicas, config.cluster.placement)
    ended.callback(_quietly, places.release)
    places.wait(config.cluster.start_timeout_s, cluster.table)
    generator = RolloutPool.start(
        str(models.paths[first]),
        RolloutOptions(
            dtype=settings.dtype,
            max_length=settings.max_length,
            use_gpu=cluster.use_gpu,
            stop_ids=tuple(sorted(models.codec.eos_ids)),
            rollout=rollout,
            trust_remote_code=settings.trust_remote_code,
        ),
        environment=engine_environment(use_gpu=cluster.use_gpu, kv_cache_gib=config.teacher.kv_cache_gib),
        num_cpus=row.cpus,
        num_gpus=row.gpus,
        placement=places.places(),
    )
    ended.callback(_quietly, generator.stop)
    return Engines(generator)


def _start_scorers(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    engines: Engines,
    roles: Sequence[ModelRole],
    parity_sequences: Sequence[tuple[tuple[int, ...], int]],
) -> None:
    """Adds the scorers of all roles to a engines, in one placement group."""
    teacher, settings = config.teacher, config.models
    row = engine_row(config.cluster, "scorer", teacher.replicas, tensor_parallel=teacher.tensor_parallel)
    bundles = [row.bundle(use_gpu=cluster.use_gpu)] * (row.replicas * len(roles))
    engines.places = Reservation(bundles, config.cluster.placement)
    engines.places.wait(config.cluster.start_timeout_s, cluster.table)
    places = engines.places.places()
    for index, role in enumerate(roles):
        engines.scorers[role] = TeacherClient.start(
            models.heads[role],
            ScorerOptions(
                role=role,
                dtype=settings.dtype,
                max_length=settings.max_length,
                use_gpu=cluster.use_gpu,
                teacher=teacher,
                trust_remote_code=settings.trust_remote_code,
            ),
            [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in parity_sequences],
            environment=engine_environment(use_gpu=cluster.use_gpu, kv_cache_gib=teacher.kv_cache_gib),
            num_cpus=row.cpus,
            num_gpus=row.gpus,
            placement=places[index * row.replicas : (index + 1) * row.replicas],
            record_folder=(config.output.folder / "quarantined").resolve(),
        )


def _quietly(stop: Callable[[], None]) -> None:
    with suppress(Exception):  # what is gone already must not hide why
        stop()
