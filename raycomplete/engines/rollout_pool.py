"""Several generating engines behind one handle: rollouts in order, weights in step, dead engines replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from torch import Tensor

from raycomplete.config.engines import ANSWER_TIMEOUT_S, SYNC_TIMEOUT_S
from raycomplete.engines.rollout_worker import EngineAnswer, RolloutOptions, RolloutWorker, Sampling
from raycomplete.engines.weights import Adapter, SentWeights, Weights, WeightSource, pack, pack_lora, version_of
from raycomplete.runtime.errors import SetupError, WaitTimeoutError, WorkError
from raycomplete.runtime.ray_calls import wait_for
from raycomplete.runtime.signals import GRACE_S

_SLICE = 256  # sequences of one call, as many as an engine runs side by side
_TASK_RETRIES = 2  # a call that has killed its engine three times is at fault itself

# Mean over the probe's tokens of |log p - log p'|, in nats. float32: rounding only, 6e-6 on SmolLM2-135M on a CPU; GPU
# kernels may round products to TF32. bfloat16: engine and trainer round to 8 bits after different kernels in every
# layer; on SmolLM2-135M 0.02 where tokens are likely, 0.04 on samples at temperature 1, 0.05 on unlikely tokens. A
# stale head costs more than a nat. What one small step changes stays below either, so this shows that the tensors
# arrived whole, not which of two neighbouring versions they are: the version in the engine's answer tells that.
_SYNC_TOLERANCE: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.1}


class SyncError(WorkError):
    """After an update of the weights, an engine's log-probabilities differ from the trainer's."""


@dataclass(frozen=True)
class SyncReport:
    """One update of the weights of all engines, and how far the engines are from the trainer after it."""

    version: int
    seconds: float  # from the call until the last engine had answered the probe
    load_s: float  # the slowest engine's time for loading; 0 where all had these weights already
    num_bytes: int
    mean_abs_difference: float  # of |log p - log p'| over the probe's tokens, nats, of the engine farthest off
    max_abs_difference: float
    num_tokens: int
    tolerance: float  # upper bound of mean_abs_difference
    transfer: str = "store"  # carrier: Ray's object store, or vLLM's name of its own


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """Responses under way: the version of their weights, and (engine, number of sequences, reference) in order."""

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the known processes only: a handle in another process counts from zero."""
        return (PoolStats, (0, 0.0, 0, 0.0, 0, self.incarnations))

    def meet(self, engine: int, incarnation: str) -> None:
        """Notes the process behind an engine; another one than before is a restart."""
        self.restarts += self.incarnations.get(engine, incarnation) != incarnation
        self.incarnations[engine] = incarnation


class RolloutPool:
    """One model behind one or more rollout actors (implements `raycomplete.runtime.types.Generator`). Picklable.

    Several handles may share the actors: each call names its own weights. Sequence i of a call samples under seed + i,
    so results do not depend on how many engines there are, up to rounding in batches of another size. An engine that
    dies is started again by Ray, loads the named weights again and repeats what it had not answered; it refuses calls
    that name `SentWeights`, which nobody else keeps.
    """

    def __init__(
        self, actors: Sequence[Any], weights: WeightSource, options: RolloutOptions, stats: PoolStats | None = None
    ) -> None:
        self._actors, self._weights, self.options = list(actors), weights, options
        self._stats = stats or PoolStats()

    @classmethod
    def start(cls, options: RolloutOptions, *, strategies: Sequence[Any] = ()) -> RolloutPool:
        """Asks Ray for actors and returns at once; `wait_until_ready` waits for them."""
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
    def stop_ids(self) -> list[int]:
        """Tokens that end a response."""
        return list(self.options.stop_ids)

    @property
    def path(self) -> str:
        """Checkpoint that this handle generates with, or that its weights start from."""
        return self._weights if isinstance(self._weights, str) else self._weights.start_path

    @property
    def side_by_side(self) -> int:
        """Sequences that all engines together answer at a time."""
        return _SLICE * len(self._actors)

    def with_weights(self, weights: WeightSource) -> RolloutPool:
        """Returns a handle on the same actors with other weights of the same architecture."""
        return RolloutPool(self._actors, weights, self.options, self._stats)

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every engine is ready; returns their number and the slowest one's start-up time."""
        references = [actor.startup_stats.remote() for actor in self._actors]
        start_s = 0.0
        for engine, reference in enumerate(references):
            stats = wait_for(reference, who=self.name(engine), what="its start", timeout_s=timeout_s)
            self._stats.meet(engine, stats["incarnation"])
            start_s = max(start_s, stats["start_s"])
        return {"start_s": start_s, "num_engines": len(self._actors)}

    def _take(self, engine: int, reference: Any, what: str, timeout_s: float) -> EngineAnswer:
        who = self.name(engine)
        answer: EngineAnswer = wait_for(reference, who=who, what=what, timeout_s=timeout_s, grace_s=GRACE_S)
        self._stats.meet(engine, answer.incarnation)
        self._stats.seconds += answer.seconds
        self._stats.loads += answer.load_s > 0
        self._stats.load_s += answer.load_s
        return answer

    def call(self, method: str, arguments: Sequence[Sequence[Any]] = ()) -> list[Any]:
        """Calls a method of every `RolloutWorker`, each with its arguments, and returns references."""
        given = arguments or [()] * len(self._actors)
        return [getattr(actor, method).remote(*items) for actor, items in zip(self._actors, given, strict=True)]

    def restart(self, engines: Sequence[int]) -> None:
        """Ends the processes of engines that may hang; Ray starts each again."""
        for engine in engines:
            ray.kill(self._actors[engine], no_restart=False)

    def pack(self, state: Mapping[str, Tensor], version: int) -> Weights:
        """Packs whole weights over the checkpoint of this handle."""
        return pack(state, version, self.path)

    def pack_lora(self, adapters: Mapping[str, Adapter], version: int) -> Weights:
        """Packs adapters over the checkpoint of this handle, which they must belong to."""
        return pack_lora(adapters, version, self.path)

    def sync(
        self, weights: Weights | SentWeights, probe: Sequence[tuple[Sequence[int], int]], expected: Sequence[Tensor]
    ) -> SyncReport:
        """Loads weights into every engine and compares log-probabilities of the engines with those of the trainer.

        Engines first finish what was submitted before.
        """
        expected_N = torch.cat([rows.detach().double().cpu() for rows in expected])
        sequences = [(list(tokens), num_prompt) for tokens, num_prompt in probe]
        started = time.perf_counter()
        references = [actor.log_probs.remote(weights, sequences) for actor in self._actors]
        self._wait_all(references, f"the weights of version {weights.version}")
        answers = [self._take(engine, item, "log-probabilities", 60.0) for engine, item in enumerate(references)]
        seconds = time.perf_counter() - started
        differences_EN = (torch.stack([torch.cat(answer.value) for answer in answers]).double() - expected_N).abs()
        means_E = differences_EN.mean(dim=1)
        report = SyncReport(
            version=weights.version,
            seconds=seconds,
            load_s=max(answer.load_s for answer in answers),
            num_bytes=weights.num_bytes,
            mean_abs_difference=float(means_E.max()),
            max_abs_difference=float(differences_EN.max()),
            num_tokens=len(expected_N),
            tolerance=_SYNC_TOLERANCE[self.options.spec.dtype],
            transfer=weights.backend if isinstance(weights, SentWeights) else "store",
        )
        if not report.mean_abs_difference <= report.tolerance:  # written so that NaN fails too
            raise SyncError(
                f"After loading version {weights.version}, the {self.name(int(means_E.argmax()))} differs from the "
                f"trainer by {report.mean_abs_difference:.3g} nats on average over {report.num_tokens} tokens (at most "
                f"{report.max_abs_difference:.3g}; tolerance {report.tolerance:.3g}).",
                "The engine does not hold the trainer's weights, or computes otherwise; rollouts would come from "
                "another model.",
            )
        return report

    def submit(
        self, sequences: Sequence[Sequence[int]], *, weights: WeightSource | None = None, **sampling: Any
    ) -> RolloutCall:
        """Starts generating and returns at once; `collect` waits. Engines take calls in the order of submission."""
        source = self._weights if weights is None else weights
        settings = Sampling(**sampling)
        shards: list[tuple[int, int, Any]] = []
        for engine, actor, first, stop in self._shares(len(sequences)):
            for start in range(first, stop, _SLICE):  # so that the timeout bounds one slice, however long the list
                part = [list(sequence) for sequence in sequences[start : min(start + _SLICE, stop)]]
                seed = None if settings.seed is None else settings.seed + start
                shards.append((engine, len(part), actor.generate.remote(source, part, settings._replace(seed=seed))))
        return RolloutCall(version_of(source), tuple(shards))

    def collect(self, call: RolloutCall) -> list[tuple[list[int], bool]]:
        """Waits for responses: new tokens without end-of-response, and whether each ended by itself."""
        responses: list[tuple[list[int], bool]] = []
        for engine, count, reference in call.shards:
            answer = self._take(engine, reference, f"{count} responses", ANSWER_TIMEOUT_S)
            if answer.version != call.version:
                raise WorkError(
                    f"The {self.name(engine)} answered with weights of version {answer.version}, "
                    f"and version {call.version} was asked for."
                )
            self._stats.tokens += sum(len(tokens) for tokens, _ in answer.value)
            responses += answer.value
        return responses

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        """Continues sequences (see `raycomplete.runtime.types.Generator.generate`)."""
        return [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]

    def generate_finished(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[tuple[list[int], bool]]:
        """Continues sequences as `submit` does, and waits as `collect` does."""
        return self.collect(self.submit(sequences, **sampling))

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
        """Returns log-probabilities of given answers under this handle's weights, nats (`RolloutEngine.log_probs`)."""
        parts = []
        for engine, actor, first, stop in self._shares(len(sequences)):
            if part := [(list(tokens), num_prompt) for tokens, num_prompt in sequences[first:stop]]:
                parts.append((engine, actor.log_probs.remote(self._weights, part)))
        found: list[list[float]] = []
        for engine, reference in parts:
            what, timeout_s = "log-probabilities of given answers", ANSWER_TIMEOUT_S
            found += [log_prob_T.tolist() for log_prob_T in self._take(engine, reference, what, timeout_s).value]
        return found

    def stats(self) -> dict[str, float]:
        """Returns what this handle collected: tokens, summed seconds in engines, tokens/s of one, restarts, loads."""
        stats = self._stats
        found = {name: getattr(stats, name) for name in ("tokens", "seconds", "restarts", "loads", "load_s")}
        return found | {"tokens_per_s": stats.tokens / stats.seconds if stats.seconds else 0.0}

    def rest(self) -> None:
        """Frees the engines' memory until the next call, which waits for their start; nothing may be under way.

        Ray ends the processes a moment later and starts them again without an engine, as after a death.
        """
        for actor in self._actors:
            ray.kill(actor, no_restart=False)
        self._stats.incarnations.clear()  # the processes that answer next are not counted as restarts

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _shares(self, count: int) -> list[tuple[int, Any, int, int]]:
        """Shares sequences evenly: (engine, actor, first, stop). Neighbours stay together: one number is their seed."""
        ends = [count * engine // len(self._actors) for engine in range(len(self._actors) + 1)]
        return list(zip(range(len(self._actors)), self._actors, ends, ends[1:], strict=False))

    def _wait_all(self, references: list[Any], what: str) -> None:
        """Waits until every engine has answered, or raises an error that names those that have not."""
        timeout_s = SYNC_TIMEOUT_S
        _, late = ray.wait(references, num_returns=len(references), timeout=timeout_s, fetch_local=False)
        if late:
            names = ", ".join(self.name(engine) for engine, item in enumerate(references) if item in late)
            raise WaitTimeoutError(
                f"After {timeout_s:.0f} s these have not answered with {what}: {names}.",
                "Engines take calls in order: roll out less at a time if they were working on earlier ones.",
            )

    def name(self, engine: int) -> str:
        """Returns an engine's name in messages."""
        return "rollout engine" if len(self._actors) == 1 else f"rollout engine {engine + 1} of {len(self._actors)}"
