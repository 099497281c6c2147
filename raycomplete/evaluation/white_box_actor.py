"""Ray actors that hold a model with its gradients and full distributions, for attacks that look inside."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from raycomplete.attacks.trial import Decoding
from raycomplete.attacks.white_box import FloatArray, SuffixProblem
from raycomplete.config import Dtype, RunConfig
from raycomplete.runtime.ray_calls import wait_for


class WhiteBoxWorker:
    """One model of transformers at a time. `WhiteBoxClient` runs it as a Ray actor."""

    def __init__(self, dtype: Dtype, use_gpu: bool, trust_remote_code: bool) -> None:
        self._dtype = dtype
        self._use_gpu = use_gpu
        self._trust_remote_code = trust_remote_code
        self._path: Path | None = None
        self._model: Any = None

    def call(self, path: Path, method: str, *arguments: Any, **settings: Any) -> Any:
        """Calls a method of `raycomplete.attacks.white_box.TorchModel` on the checkpoint at `path`.

        The path travels with every call, so a restarted actor can never answer with the wrong model.
        """
        if self._path != path:
            from raycomplete.attacks.white_box import TorchModel
            from raycomplete.data.checkpoints import load_model

            self._path, self._model = None, None  # the old model leaves before the new one comes
            model = load_model(path, self._dtype, trust_remote_code=self._trust_remote_code)
            self._path, self._model = path, TorchModel(model.to("cuda") if self._use_gpu else model)
        return getattr(self._model, method)(*arguments, **settings)


class WhiteBoxClient:
    """A model behind an actor (implements `raycomplete.attacks.white_box.WhiteBox`).

    Several clients may share an actor: each names its own checkpoint with every call.
    """

    def __init__(self, actor: Any, path: Path, timeout_s: float) -> None:
        self._actor = actor
        self._path = path
        self._timeout_s = timeout_s

    @classmethod
    def start(cls, config: RunConfig, path: Path, *, use_gpu: bool, threads: int) -> WhiteBoxClient:
        """Asks Ray for the actor and returns at once; the first call waits for it."""
        environment = {} if use_gpu else {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        settings = config.models
        actor = (
            ray.remote(WhiteBoxWorker)
            .options(
                num_cpus=config.cluster.cpus_per_engine,
                num_gpus=config.cluster.gpus_per_engine if use_gpu else 0,
                runtime_env={"env_vars": environment},
                max_restarts=2,
                max_task_retries=2,  # every call says all that it depends on, so a retried one gives the same
            )
            .remote(settings.dtype, use_gpu, settings.trust_remote_code)
        )
        return cls(actor, path, config.rollout.timeout_s)

    def with_weights(self, path: Path) -> WhiteBoxClient:
        """The same actor with another checkpoint."""
        return WhiteBoxClient(self._actor, path, self._timeout_s)

    def vocab_size(self) -> int:
        return int(self._call("the size of its vocabulary", "vocab_size"))

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
        found: list[list[tuple[int, float]]] = self._call("likeliest tokens", "top_logprobs", sequences, top)
        return found

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        found: list[list[float]] = self._call("log-probabilities", "logprobs_of", sequences, tokens)
        return found

    def sample(
        self, sequences: Sequence[Sequence[int]], decoding: Decoding, *, seed: int, stop_ids: Collection[int]
    ) -> list[list[int]]:
        what = f"{len(sequences)} responses"
        found: list[list[int]] = self._call(what, "sample", sequences, decoding, seed=seed, stop_ids=stop_ids)
        return found

    def suffix_gradient(self, problem: SuffixProblem, suffix: Sequence[int]) -> FloatArray:
        found: FloatArray = self._call("a gradient", "suffix_gradient", problem, suffix)
        return found

    def suffix_losses(self, problem: SuffixProblem, suffixes: Sequence[Sequence[int]]) -> list[float]:
        found: list[float] = self._call("losses of suffixes", "suffix_losses", problem, suffixes)
        return found

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        with suppress(Exception):  # an actor that is gone already must not hide why
            ray.kill(self._actor)

    def _call(self, what: str, method: str, *arguments: Any, **settings: Any) -> Any:
        reference = self._actor.call.remote(self._path, method, *arguments, **settings)
        return wait_for(reference, who="white-box model", what=what, timeout_s=self._timeout_s)
