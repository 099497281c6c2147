"""The engines of a run: scorers and rollout engines, placed and started together, and stopped together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import Models
from raycomplete.engines.cluster import Cluster, Reservation, nodes_of, uses_gpu
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scorers import TeacherClient
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.weight_transfer import choose_backend
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import available_cpus, package_versions
from raycomplete.runtime.types import ModelRole


@dataclass
class Engines:
    """Running engines.

    Attributes:
        generator: Generates with base's weights at first (`Models.start`); `generator.with_weights(path)` with others.
        scorers: By role; empty where only text is needed.
        stats: Start-up times and parity reports, for the run folder.
        reservation: Placement group of the scorers, given back with them: what follows training needs the room.
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


@contextmanager
def start_engines(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    console: Console,
    *,
    parity_sequences: Sequence[tuple[tuple[int, ...], int]],
    scored: Sequence[ModelRole],
) -> Iterator[Engines]:
    """Places the engines, starts them side by side, waits until each is ready, and ends them on the way out.

    `raycomplete.engines.run.Run.start_engines` says what the arguments are.
    """
    spec = EngineSpec.from_config(config, "rollout", models.start, use_gpu=cluster.use_gpu)
    num_gpus = sum(node.gpus for node in nodes_of(ray.nodes())) if cluster.use_gpu else 0.0
    backend, why = choose_backend(config, num_gpus=num_gpus, vllm_version=package_versions().get("vllm", ""))
    spec = replace(spec, weight_transfer=backend)
    if cluster.use_gpu and config.rollout.on_policy and not backend:
        console.note(f"New weights reach the rollout engines through the object store: {why}")
    with ExitStack() as ended:
        reservation = Reservation([spec.bundle()] * config.rollout.num_engines, config.cluster.placement)
        ended.callback(_quietly, reservation.release)
        reservation.wait(config.cluster.start_timeout_s, cluster.table)
        options = RolloutOptions(spec, tuple(sorted(models.codec.eos_ids)), config.rollout)
        engines = Engines(RolloutPool.start(options, strategies=reservation.strategies()))
        ended.callback(_quietly, engines.generator.stop)
        ended.callback(engines.stop_scorers)
        if parity_sequences:
            _start_scorers(config, cluster, models, engines, scored, parity_sequences)
        names = ", ".join(["generator", *(f"{role} scorer" for role in engines.scorers)])
        device = "GPU" if cluster.use_gpu else f"{available_cpus()} CPU cores"
        with console.stage(f"Engines started: {names} ({device})"):
            engines.stats["generator"] = engines.generator.wait_until_ready(config.cluster.start_timeout_s)
            for name, scorer in engines.scorers.items():
                engines.stats[name] = scorer.wait_until_ready(config.cluster.start_timeout_s)
        for name in engines.scorers:
            parity = engines.stats[name]["parity"]
            console.note(
                f"Parity of {name}: rebuilt log-probabilities within {parity['mean_expected_difference']:.2g} nats of "
                f"transformers' on {parity['num_rows']} tokens [dim](tolerance {parity['tolerance']:.2g})[/dim]"
            )
        yield engines


def start_engine(config: RunConfig, path: Path, codec: ChatCodec) -> RolloutPool:
    """Asks Ray for one generating engine of a model that is not the run's generator: attacker, judge or chat.

    Returns at once; `wait_until_ready` waits for the engine.
    """
    spec = EngineSpec.from_config(config, "single", path, use_gpu=uses_gpu(config.cluster))
    rollout = config.rollout.model_copy(update={"num_engines": 1, "tensor_parallel": 1, "colocated": False})
    return RolloutPool.start(RolloutOptions(spec, tuple(sorted(codec.eos_ids)), rollout))


def _start_scorers(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    engines: Engines,
    roles: Sequence[ModelRole],
    parity_sequences: Sequence[tuple[tuple[int, ...], int]],
) -> None:
    """Adds the scorers of all roles to the engines, in one placement group."""
    replicas = config.teacher.replicas
    specs = [
        EngineSpec.from_config(config, "scorer", models.heads[role].path, use_gpu=cluster.use_gpu) for role in roles
    ]
    bundles = [spec.bundle() for spec in specs for _ in range(replicas)]
    engines.reservation = Reservation(bundles, config.cluster.placement)
    engines.reservation.wait(config.cluster.start_timeout_s, cluster.table)
    strategies = engines.reservation.strategies()
    for index, (role, spec) in enumerate(zip(roles, specs, strict=True)):
        engines.scorers[role] = TeacherClient.start(
            role,
            models.heads[role],
            spec,
            config.teacher,
            [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in parity_sequences],
            strategies=strategies[index * replicas : (index + 1) * replicas],
            record_folder=(config.output.folder / "quarantined").resolve(),
        )


def _quietly(stop: Callable[[], None]) -> None:
    with suppress(Exception):  # an actor that is gone already must not hide why
        stop()
