"""Tools of attacks besides the generator: white boxes, the guide, rewriting models, and trained copies.

Attacks name the tools that they need; devices are reserved by that. Everything starts at its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from raycomplete.attacks.attack import Attack
from raycomplete.attacks.finetune import FinetuneConfig
from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.target import Attacker, AttackTools
from raycomplete.config import Dtype, RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint, resolve_checkpoint
from raycomplete.engines.cluster import uses_gpu
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.engines.start import start_engine
from raycomplete.evaluation.fine_tuning import fine_tune, read_chats
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.ray_calls import wait_for
from raycomplete.runtime.types import Generator


def extra_engines(config: RunConfig) -> int:
    """Counts the engines and models that the attacks and the judge of a run hold besides the generator."""
    attacks = _attacks(config)
    needs = {need for attack in attacks for need in attack.needs}
    attackers = {attack.attacker_checkpoint for attack in attacks} - {None}
    white_boxes = config.evaluation.white_boxes if "white_boxes" in needs else 0
    return white_boxes + ("guide" in needs) + len(attackers) + (config.evaluation.judge.kind == "model")


def training_workers(config: RunConfig) -> int:
    """Counts the training workers that the attacks of a run need."""
    return int(any("fine_tune" in attack.needs for attack in _attacks(config)))


def check_attacks(config: RunConfig) -> None:
    """Refuses attacks whose files or checkpoints are missing, before anything is started.

    Raises:
        CheckpointError: A rewriting model is not there.
        ConfigError, DataError: Chats of the fine-tuning attack are missing or cannot be used.
    """
    for attack in _attacks(config):
        if isinstance(attack.config, FinetuneConfig):
            for dataset in attack.config.datasets:
                read_chats(config, attack.config, dataset)
        if attack.attacker_checkpoint is not None:
            resolve_checkpoint(attack.attacker_checkpoint, role="attacker")


class AttackResources:
    """Starts the tools of one evaluation's attacks at their first use; `stop` ends what was started."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._boxes: list[WhiteBoxClient] = []
        self._guide: WhiteBoxClient | None = None
        self._attackers: dict[str | None, Attacker] = {}
        self._engines: list[RolloutPool] = []

    def tools(self, path: Path) -> AttackTools:
        """Returns the tools of attacks on one checkpoint."""
        run = self._run

        def white_boxes() -> Sequence[WhiteBoxClient]:
            if not self._boxes:
                count = run.config.evaluation.white_boxes
                self._boxes += [self._white_box(path, available_cpus() // count) for _ in range(count)]
            return [box.with_weights(path) for box in self._boxes]

        def trained(settings: FinetuneConfig, dataset: str) -> Generator:
            return run.engines.generator.with_weights(str(fine_tune(run, settings, dataset, path)))

        has_base = "base" in run.models.paths
        return AttackTools(
            white_boxes=white_boxes,
            guide=self._start_guide if has_base else None,
            guide_id=run.models.fingerprint("base") if has_base else "",
            attacker=self._attacker,
            fine_tune=trained,
            fine_tune_id=lambda settings, dataset: content_hash(
                [read_chats(run.config, settings, dataset), run.config.train.seed]
            ),
        )

    def stop(self) -> None:
        """Ends what was started."""
        for box in (*self._boxes, *([self._guide] if self._guide else [])):
            box.stop()
        for engine in self._engines:
            with suppress(Exception):  # an actor that is gone already must not hide why
                engine.stop()

    def _white_box(self, path: Path, threads: int) -> WhiteBoxClient:
        return WhiteBoxClient.start(self._run.config, path, threads=max(threads, 1))

    def _start_guide(self) -> WhiteBoxClient:
        if self._guide is None:
            self._guide = self._white_box(self._run.models.paths["base"], available_cpus())
        return self._guide

    def _attacker(self, checkpoint: str | None) -> Attacker:
        if checkpoint not in self._attackers:
            run, config = self._run, self._run.config
            generator: Generator
            if checkpoint is None:
                path, codec = run.models.paths["base"], run.models.codec
                generator = run.engines.generator.with_weights(str(path))
            else:
                path = resolve_checkpoint(checkpoint, role="attacker")
                codec = ChatCodec(path, trust_remote_code=config.models.trust_remote_code)
                with run.console.stage("Engine of the rewriting model started"):
                    pool = start_engine(config, path, codec)
                    self._engines.append(pool)
                    pool.wait_until_ready(config.cluster.start_timeout_s)
                generator = pool
            self._attackers[checkpoint] = Attacker(fingerprint(path), generator, codec, config.models.max_length)
        return self._attackers[checkpoint]


class WhiteBoxWorker:
    """Holds one model of transformers at a time. `WhiteBoxClient` runs it as a Ray actor."""

    def __init__(self, dtype: Dtype, use_gpu: bool, trust_remote_code: bool) -> None:
        self._dtype = dtype
        self._use_gpu = use_gpu
        self._trust_remote_code = trust_remote_code
        self._path: Path | None = None
        self._model: Any = None

    def call(self, path: Path, method: str, *arguments: Any) -> Any:
        """Calls a method of `raycomplete.attacks.white_box.TorchModel` on the checkpoint at `path`.

        The path travels with every call, so a restarted actor can never answer with the wrong model.
        """
        if self._path != path:
            from raycomplete.attacks.white_box import TorchModel
            from raycomplete.data.checkpoints import load_model

            self._path, self._model = None, None  # the old model leaves before the new one comes
            model = load_model(path, self._dtype, trust_remote_code=self._trust_remote_code)
            self._path, self._model = path, TorchModel(model.to("cuda") if self._use_gpu else model)
        return getattr(self._model, method)(*arguments)


def _remote(method: str, what: str) -> Callable[..., Any]:
    """Makes a method of `WhiteBoxClient` that asks the actor for the same method of the model."""

    def call(client: WhiteBoxClient, *arguments: Any) -> Any:
        reference = client._actor.call.remote(client._path, method, *arguments)
        return wait_for(reference, who="white-box model", what=what, timeout_s=client._timeout_s)

    return call


class WhiteBoxClient:
    """A model behind an actor (implements `raycomplete.attacks.target.WhiteBox`).

    Several clients may share an actor: each names its own checkpoint with every call.
    """

    def __init__(self, actor: Any, path: Path, timeout_s: float) -> None:
        self._actor = actor
        self._path = path
        self._timeout_s = timeout_s

    @classmethod
    def start(cls, config: RunConfig, path: Path, *, threads: int) -> WhiteBoxClient:
        """Asks Ray for the actor and returns at once; the first call waits for it."""
        use_gpu, cluster, models = uses_gpu(config.cluster), config.cluster, config.models
        environment = {} if use_gpu else {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        actor = (
            ray.remote(WhiteBoxWorker)
            .options(
                num_cpus=cluster.cpus_per_engine,
                num_gpus=cluster.gpus_per_engine if use_gpu else 0,
                runtime_env={"env_vars": environment},
                max_restarts=2,
                max_task_retries=2,  # every call says all that it depends on, so a retried one gives the same
            )
            .remote(models.dtype, use_gpu, models.trust_remote_code)
        )
        return cls(actor, path, config.rollout.timeout_s)

    def with_weights(self, path: Path) -> WhiteBoxClient:
        """Returns the same actor with another checkpoint."""
        return WhiteBoxClient(self._actor, path, self._timeout_s)

    vocab_size = _remote("vocab_size", "the size of its vocabulary")
    top_logprobs = _remote("top_logprobs", "likeliest tokens")
    logprobs_of = _remote("logprobs_of", "log-probabilities")
    suffix_gradient = _remote("suffix_gradient", "a gradient")
    suffix_losses = _remote("suffix_losses", "losses of suffixes")

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        with suppress(Exception):  # an actor that is gone already must not hide why
            ray.kill(self._actor)


def _attacks(config: RunConfig) -> list[Attack[Any]]:
    return [build_attack(settings) for settings in config.evaluation.attacks]
