"""Several generating engines behind one handle: rollouts in order, weights in step, dead engines replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from raycomplete.engines.rollout_calls import PoolStats, RolloutCall
from raycomplete.engines.rollout_worker import Answer, RolloutOptions, RolloutWorker
from raycomplete.engines.weight_sync import DEFAULT_TOLERANCE, SyncReport, compare
from raycomplete.engines.weights import Adapter, Weights, WeightSource, pack, pack_lora, version_of
from raycomplete.runtime.errors import SetupError, WaitTimeoutError, WorkError
from raycomplete.runtime.ray_calls import wait_for

_SLICE = 256  # sequences of one call, as many as an engine runs side by side
_TASK_RETRIES = 2  # a call that has killed its engine three times is at fault itself


class RolloutPool:
    """One model behind one or more rollout actors (implements `raycomplete.runtime.types.Generator`). Picklable.

    Several handles may share the actors: each call names its own weights. Sequence i of a call samples under seed + i,
    so results do not depend on how many engines there are, up to rounding in batches of another size. An engine that
    dies is started again by Ray, loads the named weights again and repeats what it had not answered.

    Args:
        actors: Handles of `RolloutWorker` actors.
        weights: What `generate` speaks with.
        options: Of every actor.
        pool_stats: What another handle on these actors has seen.
    """

    def __init__(
        self, actors: Sequence[Any], weights: WeightSource, options: RolloutOptions, pool_stats: PoolStats | None = None
    ) -> None:
        self._actors = list(actors)
        self._weights = weights
        self._options = options
        self._pool_stats = pool_stats or PoolStats()

    @classmethod
    def start(
        cls,
        path: str,
        options: RolloutOptions,
        *,
        num_cpus: float,
        num_gpus: float,
        environment: dict[str, str],
        placement: Sequence[Any] = (),
    ) -> RolloutPool:
        """Asks Ray for `rollout.num_engines` actors and returns at once; `wait_until_ready` waits for them.

        Args:
            path: Checkpoint to start from.
            options: Of every engine.
            num_cpus: Logical CPUs of one engine.
            num_gpus: GPUs of one engine, where GPUs are used.
            environment: See `raycomplete.engines.spec.engine_environment`.
            placement: Ray's scheduling strategy of each engine; empty lets Ray choose.

        Raises:
            SetupError: `rollout.colocated` on a CPU.
        """
        if options.rollout.colocated and not options.use_gpu:
            raise SetupError(
                "rollout.colocated lets engines sleep to free a GPU's memory, and this run uses no GPU.",
                "Set rollout.colocated to false.",
            )
        actor_class = ray.remote(RolloutWorker)
        settings: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus if options.use_gpu else 0,
            "runtime_env": {"env_vars": environment},
            "max_restarts": -1,  # an idle actor holds no engine that could crash in a loop; calls bound the retries
            "max_task_retries": _TASK_RETRIES,  # seeded sampling from named weights: a retry gives the same tokens
        }
        strategies = list(placement) or [None] * options.rollout.num_engines
        actors = [
            actor_class.options(**settings, scheduling_strategy=strategy).remote(path, options)
            for strategy in strategies
        ]
        return cls(actors, path, options)

    @property
    def path(self) -> str:
        """The checkpoint that this handle speaks with, or that its weights start from."""
        return self._weights if isinstance(self._weights, str) else self._weights.start_path

    def with_weights(self, weights: WeightSource) -> RolloutPool:
        """The same actors with other weights of the same architecture."""
        return RolloutPool(self._actors, weights, self._options, self._pool_stats)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every engine is ready; returns their number and the slowest one's start-up time."""
        references = [actor.startup_stats.remote() for actor in self._actors]
        start_s = 0.0
        for engine, reference in enumerate(references):
            stats = wait_for(reference, who=self._name(engine), what="its start", timeout_s=timeout_s)
            self._pool_stats.meet(engine, stats["incarnation"])
            start_s = max(start_s, stats["start_s"])
        return {"start_s": start_s, "num_engines": len(self._actors)}

    def pack(self, state: Mapping[str, Tensor], version: int) -> Weights:
        """`weights.pack` with the checkpoint of this handle."""
        return pack(state, version, self.path)

    def pack_lora(self, adapters: Mapping[str, Adapter | tuple[Tensor, Tensor, float]], version: int) -> Weights:
        """`weights.pack_lora` with the checkpoint of this handle, which must be the one the adapters belong to."""
        return pack_lora(adapters, version, self.path)

    def sync(
        self, weights: Weights, probe: Sequence[tuple[Sequence[int], int]], expected: Sequence[Tensor]
    ) -> SyncReport:
        """Loads weights into every engine and compares what the engines say with what the trainer says.

        Engines first finish what was submitted before.

        Args:
            weights: Packed by the trainer.
            probe: A few short (token ids, number of prompt tokens), at least one of each and one to generate left.
            expected: Of each probe [response tokens] log-probabilities by the trainer, nats, temperature 1.

        Raises:
            SyncError: The mean difference on an engine exceeds `rollout.sync_tolerance`.
            WaitTimeoutError: An engine took longer than `rollout.sync_timeout_s`.
            WorkError: The weights cannot be loaded.
        """
        expected_N = torch.cat([rows.detach().double().cpu() for rows in expected])
        sequences = [(list(tokens), num_prompt) for tokens, num_prompt in probe]
        started = time.perf_counter()
        references = [actor.log_probs.remote(weights, sequences) for actor in self._actors]
        self._wait_all(references, f"the weights of version {weights.version}")
        answers: list[Answer] = []
        for engine, reference in enumerate(references):
            answers.append(wait_for(reference, who=self._name(engine), what="log-probabilities", timeout_s=60.0))
            self._pool_stats.enter(engine, answers[-1])
        return compare(
            [torch.cat(answer.value) for answer in answers],
            expected_N,
            names=[self._name(engine) for engine in range(len(answers))],
            weights=weights,
            seconds=time.perf_counter() - started,
            load_s=max(answer.load_s for answer in answers),
            tolerance=self._options.rollout.sync_tolerance or DEFAULT_TOLERANCE[self._options.dtype],
        )

    def submit(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        weights: WeightSource | None = None,
    ) -> RolloutCall:
        """Starts generating and returns at once; `collect` waits. Engines take calls in the order of submission.

        Args:
            sequences: Prompt token ids, prefill included; shared evenly between the engines.
            max_tokens: Upper bound on new tokens of each.
            temperature: 0 is greedy.
            top_p: Nucleus mass when sampling.
            top_k: Likeliest tokens that are sampled from; 0 for all of them.
            seed: Sequence i samples under seed + i.
            weights: What to speak with; this handle's own when absent.
        """
        source = self._weights if weights is None else weights
        parts: list[tuple[int, int, Any]] = []
        for engine, actor in enumerate(self._actors):
            # Neighbours stay together, so that one number carries the seeds of a slice.
            first, stop = (len(sequences) * index // len(self._actors) for index in (engine, engine + 1))
            for start in range(first, stop, _SLICE):  # so that the timeout bounds one slice, however long the list
                part = [list(sequence) for sequence in sequences[start : min(start + _SLICE, stop)]]
                part_seed = None if seed is None else seed + start
                reference = actor.generate.remote(source, part, max_tokens, temperature, top_p, top_k, part_seed)
                parts.append((engine, len(part), reference))
        call = RolloutCall(version_of(source), len(sequences), tuple(parts))
        with self._pool_stats.lock:
            self._pool_stats.open.add(call)
        return call

    def collect(self, call: RolloutCall) -> list[tuple[list[int], bool]]:
        """Waits for responses: new tokens without end-of-response, and whether each ended by itself.

        Raises:
            WaitTimeoutError: One slice took longer than `rollout.timeout_s`.
            WorkError: An engine died again and again, failed, or answered with other weights than the call named.
        """
        responses: list[tuple[list[int], bool]] = []
        for engine, count, reference in call.parts:
            answer: Answer = wait_for(
                reference,
                who=self._name(engine),
                what=f"{count} responses",
                timeout_s=self._options.rollout.timeout_s,
            )
            if answer.version != call.version:
                raise WorkError(
                    f"The {self._name(engine)} answered with weights of version {answer.version}, "
                    f"and version {call.version} was asked for."
                )
            self._pool_stats.enter(engine, answer)
            self._pool_stats.tokens += sum(len(tokens) for tokens, _ in answer.value)
            responses += answer.value
        with self._pool_stats.lock:
            self._pool_stats.open.discard(call)
        return responses

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """New token ids of each sequence, end-of-response left out."""
        finished = self.generate_finished(
            sequences, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        return [tokens for tokens, _ in finished]

    def generate_finished(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[tuple[list[int], bool]]:
        """As `generate`, and whether each response ended by itself rather than by the token limit."""
        return self.collect(
            self.submit(sequences, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        )

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
        """Log-probabilities of given answers under this handle's weights, in nats (see `RolloutEngine.log_probs`).

        Raises:
            WaitTimeoutError: An engine took longer than `rollout.timeout_s` over its share.
            WorkError: An engine died again and again, or failed.
        """
        parts = []
        for engine, actor in enumerate(self._actors):
            first, stop = (len(sequences) * index // len(self._actors) for index in (engine, engine + 1))
            if first < stop:
                part = [(list(tokens), num_prompt) for tokens, num_prompt in sequences[first:stop]]
                parts.append((engine, actor.log_probs.remote(self._weights, part)))
        found: list[list[float]] = []
        for engine, reference in parts:
            timeout_s = self._options.rollout.timeout_s
            answer: Answer = wait_for(
                reference, who=self._name(engine), what="log-probabilities of given answers", timeout_s=timeout_s
            )
            self._pool_stats.enter(engine, answer)
            found += [log_prob_T.tolist() for log_prob_T in answer.value]
        return found

    def stats(self) -> dict[str, float]:
        """What this handle collected: tokens, seconds in engines (their sum), tokens/s of one, restarts, loads."""
        pool_stats = self._pool_stats
        return {
            "tokens": pool_stats.tokens,
            "seconds": pool_stats.seconds,
            "tokens_per_s": pool_stats.tokens / pool_stats.seconds if pool_stats.seconds else 0.0,
            "restarts": pool_stats.restarts,
            "loads": pool_stats.loads,
            "load_s": pool_stats.load_s,
        }

    def stop(self) -> None:
        """Ends the actors and frees their memory."""
        for actor in self._actors:
            ray.kill(actor)

    def _wait_all(self, references: list[Any], what: str) -> None:
        """Waits until every engine has answered, or names those that have not."""
        timeout_s = self._options.rollout.sync_timeout_s
        _, late = ray.wait(references, num_returns=len(references), timeout=timeout_s, fetch_local=False)
        if late:
            names = ", ".join(self._name(engine) for engine, item in enumerate(references) if item in late)
            raise WaitTimeoutError(
                f"After {timeout_s:.0f} s these have not answered with {what}: {names}.",
                f"{self._pool_stats.num_unfinished()} parts of earlier calls are unfinished, and engines take calls in "
                "order. Raise rollout.sync_timeout_s if they were working, or roll out less at a time.",
            )

    def _name(self, engine: int) -> str:
        return "rollout engine" if len(self._actors) == 1 else f"rollout engine {engine + 1} of {len(self._actors)}"
