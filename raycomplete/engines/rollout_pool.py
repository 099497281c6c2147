"""Several generating engines behind one handle: rollouts in order, weights in step, dead engines replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakSet

import ray
import torch
from torch import Tensor

from raycomplete.engines.rollout_worker import EngineAnswer, RolloutOptions, RolloutWorker
from raycomplete.engines.weights import (
    SYNC_TOLERANCE,
    Adapter,
    SyncReport,
    Weights,
    WeightSource,
    compare,
    pack,
    pack_lora,
    version_of,
)
from raycomplete.runtime.errors import SetupError, WaitTimeoutError, WorkError
from raycomplete.runtime.ray_calls import wait_for

_SLICE = 256  # sequences of one call, as many as an engine runs side by side
_TASK_RETRIES = 2  # a call that has killed its engine three times is at fault itself


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """Responses under way.

    Attributes:
        version: Version of the weights that make them; None for a checkpoint.
        shards: (engine, number of sequences, reference) in the order of the sequences.
    """

    version: int | None
    shards: tuple[tuple[int, int, Any], ...]


@dataclass
class PoolStats:
    """Counts of one handle on its engines, shared by the handles that `with_weights` makes of it."""

    tokens: int = 0
    seconds: float = 0.0
    loads: int = 0
    load_s: float = 0.0
    restarts: int = 0
    incarnations: dict[int, str] = field(default_factory=dict)
    open: WeakSet[RolloutCall] = field(default_factory=WeakSet)
    lock: Lock = field(default_factory=Lock)  # guards `open`: one thread may collect while another submits

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the known processes only: a handle in another process counts from zero."""
        return (PoolStats, (0, 0.0, 0, 0.0, 0, self.incarnations))

    def meet(self, engine: int, incarnation: str) -> None:
        """Notes the process behind an engine; another one than before is a restart."""
        self.restarts += self.incarnations.get(engine, incarnation) != incarnation
        self.incarnations[engine] = incarnation

    def enter(self, engine: int, answer: EngineAnswer) -> None:
        """Adds the costs of an answer."""
        self.meet(engine, answer.incarnation)
        self.seconds += answer.seconds
        self.loads += answer.load_s > 0
        self.load_s += answer.load_s

    def num_unfinished(self) -> int:
        """Counts the shards of calls that no engine has answered yet."""
        with self.lock:
            references = [reference for call in self.open for _, _, reference in call.shards]
        return len(ray.wait(references, num_returns=len(references), timeout=0)[1]) if references else 0


class RolloutPool:
    """One model behind one or more rollout actors (implements `raycomplete.runtime.types.Generator`). Picklable.

    Several handles may share the actors: each call names its own weights. Sequence i of a call samples under seed + i,
    so results do not depend on how many engines there are, up to rounding in batches of another size. An engine that
    dies is started again by Ray, loads the named weights again and repeats what it had not answered.

    Args:
        stats: Counts shared with another handle on these actors.
    """

    def __init__(
        self, actors: Sequence[Any], weights: WeightSource, options: RolloutOptions, stats: PoolStats | None = None
    ) -> None:
        self._actors = list(actors)
        self._weights = weights
        self._options = options
        self._stats = stats or PoolStats()

    @classmethod
    def start(cls, options: RolloutOptions, *, strategies: Sequence[Any] = ()) -> RolloutPool:
        """Asks Ray for `rollout.num_engines` actors and returns at once; `wait_until_ready` waits for them.

        Args:
            strategies: Ray's scheduling strategy of each engine; empty lets Ray choose.

        Raises:
            SetupError: `rollout.colocated` on a CPU.
        """
        if options.spec.sleeps and not options.spec.use_gpu:
            raise SetupError(
                "rollout.colocated lets engines sleep to free a GPU's memory, and this run uses no GPU.",
                "Set rollout.colocated to false.",
            )
        settings = options.spec.resources() | {
            "max_restarts": -1,  # an idle actor holds no engine that could crash in a loop; calls bound the retries
            "max_task_retries": _TASK_RETRIES,  # seeded sampling from named weights: a retry gives the same tokens
        }
        actors = [
            ray.remote(RolloutWorker).options(**settings, scheduling_strategy=strategy).remote(options)
            for strategy in list(strategies) or [None] * options.rollout.num_engines
        ]
        return cls(actors, options.spec.checkpoint, options)

    @property
    def path(self) -> str:
        """Checkpoint that this handle generates with, or that its weights start from."""
        return self._weights if isinstance(self._weights, str) else self._weights.start_path

    def with_weights(self, weights: WeightSource) -> RolloutPool:
        """Returns a handle on the same actors with other weights of the same architecture."""
        return RolloutPool(self._actors, weights, self._options, self._stats)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every engine is ready; returns their number and the slowest one's start-up time."""
        references = [actor.startup_stats.remote() for actor in self._actors]
        start_s = 0.0
        for engine, reference in enumerate(references):
            stats = wait_for(reference, who=self._name(engine), what="its start", timeout_s=timeout_s)
            self._stats.meet(engine, stats["incarnation"])
            start_s = max(start_s, stats["start_s"])
        return {"start_s": start_s, "num_engines": len(self._actors)}

    def pack(self, state: Mapping[str, Tensor], version: int) -> Weights:
        """Packs whole weights (see `weights.pack`) over the checkpoint of this handle."""
        return pack(state, version, self.path)

    def pack_lora(self, adapters: Mapping[str, Adapter], version: int) -> Weights:
        """Packs adapters (see `weights.pack_lora`) over the checkpoint of this handle, which they must belong to."""
        return pack_lora(adapters, version, self.path)

    def sync(
        self, weights: Weights, probe: Sequence[tuple[Sequence[int], int]], expected: Sequence[Tensor]
    ) -> SyncReport:
        """Loads weights into every engine and compares log-probabilities of the engines with those of the trainer.

        Engines first finish what was submitted before.

        Args:
            probe: A few short (token ids, number of prompt tokens), at least one of each and one to generate left.
            expected: For each probe the trainer's [response tokens] log-probabilities, nats, temperature 1.

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
        answers: list[EngineAnswer] = []
        for engine, reference in enumerate(references):
            answers.append(wait_for(reference, who=self._name(engine), what="log-probabilities", timeout_s=60.0))
            self._stats.enter(engine, answers[-1])
        return compare(
            [torch.cat(answer.value) for answer in answers],
            expected_N,
            names=[self._name(engine) for engine in range(len(answers))],
            weights=weights,
            seconds=time.perf_counter() - started,
            load_s=max(answer.load_s for answer in answers),
            tolerance=self._options.rollout.sync_tolerance or SYNC_TOLERANCE[self._options.spec.dtype],
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
            top_k: Likeliest tokens that are sampled from; 0 for all of them.
            seed: Sequence i samples under seed + i.
            weights: Weights to generate with; this handle's own when absent.
        """
        source = self._weights if weights is None else weights
        shards: list[tuple[int, int, Any]] = []
        for engine, actor in enumerate(self._actors):
            # Neighbours stay together, so that one number carries the seeds of a slice.
            first, stop = (len(sequences) * index // len(self._actors) for index in (engine, engine + 1))
            for start in range(first, stop, _SLICE):  # so that the timeout bounds one slice, however long the list
                part = [list(sequence) for sequence in sequences[start : min(start + _SLICE, stop)]]
                part_seed = None if seed is None else seed + start
                reference = actor.generate.remote(source, part, max_tokens, temperature, top_p, top_k, part_seed)
                shards.append((engine, len(part), reference))
        call = RolloutCall(version_of(source), tuple(shards))
        with self._stats.lock:
            self._stats.open.add(call)
        return call

    def collect(self, call: RolloutCall) -> list[tuple[list[int], bool]]:
        """Waits for responses: new tokens without end-of-response, and whether each ended by itself.

        Raises:
            WaitTimeoutError: One slice took longer than `rollout.timeout_s`.
            WorkError: An engine died again and again, failed, or answered with other weights than the call named.
        """
        responses: list[tuple[list[int], bool]] = []
        for engine, count, reference in call.shards:
            answer: EngineAnswer = wait_for(
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
            self._stats.enter(engine, answer)
            self._stats.tokens += sum(len(tokens) for tokens, _ in answer.value)
            responses += answer.value
        with self._stats.lock:
            self._stats.open.discard(call)
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
        """Continues sequences (see `raycomplete.runtime.types.Generator.generate`)."""
        call = self.submit(
            sequences, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        return [tokens for tokens, _ in self.collect(call)]

    def generate_finished(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[tuple[list[int], bool]]:
        """Continues sequences as `submit` does, and waits as `collect` does."""
        return self.collect(self.submit(sequences, **sampling))

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
        """Returns log-probabilities of given answers under this handle's weights, nats (`RolloutEngine.log_probs`).

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
            answer: EngineAnswer = wait_for(
                reference, who=self._name(engine), what="log-probabilities of given answers", timeout_s=timeout_s
            )
            self._stats.enter(engine, answer)
            found += [log_prob_T.tolist() for log_prob_T in answer.value]
        return found

    def stats(self) -> dict[str, float]:
        """Returns what this handle collected: tokens, summed seconds in engines, tokens/s of one, restarts, loads."""
        stats = self._stats
        return {
            "tokens": stats.tokens,
            "seconds": stats.seconds,
            "tokens_per_s": stats.tokens / stats.seconds if stats.seconds else 0.0,
            "restarts": stats.restarts,
            "loads": stats.loads,
            "load_s": stats.load_s,
        }

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _wait_all(self, references: list[Any], what: str) -> None:
        """Waits until every engine has answered, or raises an error that names those that have not."""
        timeout_s = self._options.rollout.sync_timeout_s
        _, late = ray.wait(references, num_returns=len(references), timeout=timeout_s, fetch_local=False)
        if late:
            names = ", ".join(self._name(engine) for engine, item in enumerate(references) if item in late)
            raise WaitTimeoutError(
                f"After {timeout_s:.0f} s these have not answered with {what}: {names}.",
                f"{self._stats.num_unfinished()} parts of earlier calls are unfinished, and engines take calls in "
                "order. Raise rollout.sync_timeout_s if they were working, or roll out less at a time.",
            )

    def _name(self, engine: int) -> str:
        return "rollout engine" if len(self._actors) == 1 else f"rollout engine {engine + 1} of {len(self._actors)}"
