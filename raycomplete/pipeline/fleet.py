"""The engines of a run: two scorers and one generator, started together and stopped together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from raycomplete.cluster import Cluster
from raycomplete.config import RunConfig
from raycomplete.engine_options import available_cpus, engine_environment
from raycomplete.pipeline.prepare import Models
from raycomplete.rollout.pool import RolloutPool
from raycomplete.rollout.worker import RolloutOptions
from raycomplete.scoring.actors import ScorerOptions, ScoringClient
from raycomplete.scoring.payload import ScoreRequest
from raycomplete.screen import Screen
from raycomplete.types import ModelRole


@dataclass
class Fleet:
    """Running engines.

    Attributes:
        generator: Generates with base's weights at first; `generator.with_weights(path)` with others.
        scorers: By role; empty where only text is needed.
        facts: Start-up times and parity reports, for the run folder.
    """

    generator: RolloutPool
    scorers: dict[str, ScoringClient] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def stop_scorers(self) -> None:
        """Frees the scorers' memory."""
        for scorer in self.scorers.values():
            with suppress(Exception):  # an actor that is gone already must not hide why
                scorer.stop()
        self.scorers = {}


@contextmanager
def start_fleet(
    config: RunConfig,
    cluster: Cluster,
    models: Models,
    screen: Screen,
    *,
    parity_sequences: Sequence[tuple[tuple[int, ...], int]] = (),
    first: ModelRole = "base",
) -> Iterator[Fleet]:
    """Starts the engines side by side, waits until each is ready, and ends them on the way out.

    Args:
        config: Run file.
        cluster: Where to place them.
        models: Checkpoints.
        screen: Told what is waited for.
        parity_sequences: (token ids, prompt tokens) that scorers are proved on; none starts no scorers.
        first: Whose weights the generator holds at first.
    """
    environment = engine_environment(use_gpu=cluster.use_gpu, kv_cache_gib=config.scoring.kv_cache_gib)
    resources = {"num_cpus": config.cluster.cpus_per_engine, "num_gpus": config.cluster.gpus_per_engine}
    settings = config.models
    generator = RolloutPool.start(
        str(models.paths[first]),
        RolloutOptions(
            dtype=settings.dtype,
            max_length=settings.max_length,
            use_gpu=cluster.use_gpu,
            stop_ids=tuple(sorted(models.codec.eos_ids)),
            rollout=config.rollout,
            trust_remote_code=settings.trust_remote_code,
        ),
        environment=environment,
        **resources,
    )
    fleet = Fleet(generator)
    try:
        if parity_sequences:
            requests = [ScoreRequest(tokens, num_prompt) for tokens, num_prompt in parity_sequences]
            roles: tuple[ModelRole, ...] = ("aligned", "base")
            for role in roles:
                options = ScorerOptions(
                    role=role,
                    dtype=settings.dtype,
                    max_length=settings.max_length,
                    use_gpu=cluster.use_gpu,
                    scoring=config.scoring,
                    trust_remote_code=settings.trust_remote_code,
                )
                fleet.scorers[role] = ScoringClient.start(
                    models.heads[role], options, requests, environment=environment, **resources
                )
        timeout_s = config.cluster.start_timeout_s
        names = ", ".join(["generator", *(f"{role} scorer" for role in fleet.scorers)])
        with screen.stage(
            f"Engines started: {names} ({'GPU' if cluster.use_gpu else f'{available_cpus()} CPU cores'})"
        ):
            fleet.facts["generator"] = generator.facts(timeout_s)
            for name, scorer in fleet.scorers.items():
                fleet.facts[name] = scorer.facts(timeout_s)
        for name in fleet.scorers:
            parity = fleet.facts[name]["parity"]
            screen.note(
                f"Parity of {name}: rebuilt log-probabilities within {parity['mean_expected_difference']:.2g} nats of "
                f"transformers' on {parity['num_rows']} tokens [dim](tolerance {parity['tolerance']:.2g})[/dim]"
            )
        yield fleet
    finally:
        with suppress(Exception):
            generator.stop()
        fleet.stop_scorers()
