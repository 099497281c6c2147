"""Models of transformers behind Ray actors, for attackers and defences that need more of a model than its text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import ray

from raycomplete.config import Dtype, RunConfig
from raycomplete.config.engines import ANSWER_TIMEOUT_S
from raycomplete.data.chat import ChatCodec
from raycomplete.engines.cluster import uses_gpu
from raycomplete.runtime.ray_calls import wait_for
from raycomplete.training.trainer import KEEP_MEMORY

ModelKind = Literal["white_box", "helper"]


def start_actor(config: RunConfig, worker: type[Any], threads: int, *arguments: Any) -> Any:
    """Asks Ray for an actor that holds models of transformers, and returns at once."""
    use_gpu = uses_gpu(config.cluster)
    on_cpu = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(max(threads, 1)), "CUDA_VISIBLE_DEVICES": ""}
    remote = ray.remote(worker).options(
        num_cpus=config.cluster.cpus_per_engine,
        num_gpus=config.cluster.gpus_per_engine if use_gpu else 0,
        runtime_env={"env_vars": {} if use_gpu else on_cpu},
        max_restarts=2,
        max_task_retries=2,
    )
    return remote.remote(config.models.weight_dtype, use_gpu, config.models.trust_remote_code, *arguments)


class ModelWorker:
    """Holds one model of transformers at a time, as a Ray actor: a `TorchModel`, or a `TokenClassifier` as a helper."""

    def __init__(self, dtype: Dtype, use_gpu: bool, trust_remote_code: bool, kind: ModelKind) -> None:
        self._dtype, self._use_gpu, self._trust_remote_code, self._kind = dtype, use_gpu, trust_remote_code, kind
        self._path: Path | None = None
        self._model: Any = None

    def call(self, path: Path, method: str, *arguments: Any) -> Any:
        """Calls a method of the model of the checkpoint at `path`.

        The path travels with every call, so a restarted actor can never answer with the wrong model.
        """
        if self._path != path:
            self._path, self._model = None, None  # the old model leaves before the new one comes
            self._path, self._model = path, self._load(path, "cuda" if self._use_gpu else "cpu")
        return getattr(self._model, method)(*arguments)

    def _load(self, path: Path, device: str) -> Any:
        from raycomplete.attacks.white_box import TokenClassifier, TorchModel
        from raycomplete.data.checkpoints import load_model, load_token_classifier

        if self._kind == "helper":  # its code is never run
            return TokenClassifier(load_token_classifier(path, self._dtype).to(device), ChatCodec(path))
        return TorchModel(load_model(path, self._dtype, trust_remote_code=self._trust_remote_code).to(device))


def _remote(method: str, what: str) -> Callable[..., Any]:
    """Makes a method of a client that asks the actor for the same method of the model."""

    def call(client: _ModelClient, *arguments: Any) -> Any:
        reference = client.actor.call.remote(client.path, method, *arguments)
        return wait_for(reference, who=client.who, what=what, timeout_s=client.timeout_s)

    return call


class _ModelClient:
    """A model behind an actor. Several clients may share one: each names its own checkpoint with every call."""

    who: ClassVar[str]

    def __init__(self, actor: Any, path: Path, timeout_s: float) -> None:
        self.actor, self.path, self.timeout_s = actor, path, timeout_s

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        with suppress(Exception):  # an actor that is gone already must not hide why
            ray.kill(self.actor)


class HelperClient(_ModelClient):
    """A token classifier behind an actor (implements `raycomplete.attacks.target.PrefillHelper`)."""

    who = "helper"
    accepts = _remote("accepts", "labels")


class WhiteBoxClient(_ModelClient):
    """A model behind an actor (implements `raycomplete.attacks.target.WhiteBox`)."""

    who = "white-box model"

    def with_weights(self, path: Path) -> WhiteBoxClient:
        """Returns the same actor with another checkpoint."""
        return WhiteBoxClient(self.actor, path, self.timeout_s)

    vocab_size = _remote("vocab_size", "the size of its vocabulary")
    num_layers = _remote("num_layers", "its number of layers")
    hidden_states = _remote("hidden_states", "inner states")
    top_logprobs = _remote("top_logprobs", "likeliest tokens")
    logprobs_of = _remote("logprobs_of", "log-probabilities")
    suffix_gradient = _remote("suffix_gradient", "a gradient")
    suffix_losses = _remote("suffix_losses", "losses of suffixes")
    suffix_embeddings = _remote("suffix_embeddings", "embeddings of a suffix")
    descend = _remote("descend", "steps of a soft prompt")
    continue_embeddings = _remote("continue_embeddings", "answers to soft prompts")


def start_white_box(config: RunConfig, path: Path, threads: int) -> WhiteBoxClient:
    """Asks Ray for the actor of a white box and returns at once; the first call waits for it."""
    actor = start_actor(config, ModelWorker, threads, "white_box")
    return WhiteBoxClient(actor, path, ANSWER_TIMEOUT_S)
