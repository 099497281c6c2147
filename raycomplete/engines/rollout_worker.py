"""The vLLM engine that continues token sequences and takes other weights, and the Ray actor around it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from raycomplete.config import RolloutConfig
from raycomplete.config.engines import SYNC_TIMEOUT_S
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.data.families import tied_head
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.vllm_start import pack_experts_anew, start_llm, turn_of
from raycomplete.engines.weight_transfer import EnginePlace, TransferStep, check_shown, device_name
from raycomplete.engines.weights import (
    SentWeights,
    Weights,
    WeightsLostError,
    WeightSource,
    check_names,
    checkpoint_folder,
    checkpoint_tensors,
    key_of,
    version_of,
)
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.prometheus import begin, record

_PROBE_TOKENS = 8
# Mean over such a probe, in nats: two kernels of one model differ by rounding, models by whole nats. On a GPU products
# in float32 may be rounded to TF32.
DECODING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Sampling(NamedTuple):
    """Settings for continuing sequences; `raycomplete.runtime.types.Generator.generate` says what each field is."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class RolloutEngine:
    """Generates with one model at a time; start it in a process whose environment is `spec.environment()`."""

    def __init__(self, spec: EngineSpec, stop_ids: Sequence[int] = ()) -> None:
        self._llm = start_llm(spec, self.arguments(spec))
        self._spec = spec
        self._stop_ids = list(stop_ids)
        config = self._llm.llm_engine.model_config.hf_config.get_text_config()
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._held = spec.checkpoint
        self._update = ExitStack()  # keeps the engine awake between the steps of a transfer
        self.version: int | None = None

    @staticmethod
    def arguments(spec: EngineSpec) -> dict[str, Any]:
        """Returns the arguments of `vllm.LLM`."""
        # A seeded request whose prompt is split between two batches fails on a CPU (vLLM 0.32: "CPU Generator does not
        # use offset"), so there prompts are read whole.
        return spec.arguments() | {
            "enable_prefix_caching": True,
            "enable_chunked_prefill": spec.use_gpu,
            "enable_sleep_mode": spec.sleeps,
        }

    @property
    def is_whole(self) -> bool:
        """False after a reload that failed half-way: vLLM cannot load over such a model."""
        return bool(self._held)

    def shut_down(self) -> None:
        """Gives back the device's memory; what a start made is never collected (`without_collection`)."""
        self._llm.llm_engine.engine_core.shutdown()

    def load(self, weights: WeightSource, *, timeout_s: float) -> bool:
        """Loads the weights of another checkpoint of the same architecture, or packed ones.

        The prefix cache holds states of the old weights, so it is emptied before the next token is made.
        """
        if key_of(weights) == self._held:
            return False
        if isinstance(weights, SentWeights):
            raise WeightsLostError(
                f"The weights of version {weights.version} were sent by {weights.backend} and are no longer in this "
                "engine: it was started again, or got others since.",
                "Send the weights again.",
            )
        with self._readable(weights, timeout_s) as arguments, self.awake():
            self._forget()
            self._llm.collective_rpc("reload_weights", kwargs=arguments)
            self._refresh()
        self._accept(weights)
        return True

    def devices(self) -> tuple[str, ...]:
        """Returns the names of this engine's devices (`device_name`)."""
        return tuple(self._llm.collective_rpc(lambda worker: device_name(torch.device(worker.device))))

    def connect(self, info: dict[str, Any]) -> None:
        """Joins the trainer's transfer by the carrier of the engine's spec, once the carrier's proof is read."""
        if proof := info.pop("proof", None):
            self._llm.collective_rpc(lambda _: check_shown(proof))
        self._llm.collective_rpc("shutdown_weight_transfer_engine")  # of a trainer that is gone
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def begin_update(self, weights: SentWeights, names: Sequence[str]) -> None:
        """Makes the engine ready to receive weights; until `end_update` it has no model that anyone may ask."""
        check_names(weights, names, tied=self._tied)
        self._update.enter_context(self.awake())
        self._forget()
        self._llm.collective_rpc("start_weight_update")

    def receive(self, update_info: dict[str, Any]) -> None:
        self._llm.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def end_update(self, weights: SentWeights) -> None:
        """Puts what was received to use; the engine's weights are `weights` from here on."""
        self._llm.collective_rpc("finish_weight_update")
        self._refresh()
        self._update.close()
        self._accept(weights)

    def _forget(self) -> None:
        self._held = ""  # a reload that fails half-way leaves no model that anyone may ask again
        self._llm.apply_model(pack_experts_anew)

    def _refresh(self) -> None:
        self._llm.apply_model(_refresh_tied_head)
        if not self._llm.reset_prefix_cache():
            raise WorkError("The engine keeps prefixes that old weights have read, so new ones cannot be used.")

    def _accept(self, weights: WeightSource) -> None:
        if self._spec.cuda_graphs:
            self.check_decoding()  # which wakes the engine itself
        self._held = key_of(weights)
        self.version = version_of(weights)

    def generate_finished(self, sequences: Sequence[Sequence[int]], sampling: Sampling) -> list[tuple[list[int], bool]]:
        """Continues sequences."""
        from vllm import SamplingParams

        max_tokens, temperature, top_p, top_k, seed = sampling
        parameters = [
            SamplingParams(
                max_tokens=min(max_tokens, self._spec.max_length - len(sequence)),
                temperature=temperature,
                top_p=top_p if temperature > 0 else 1.0,
                top_k=top_k if temperature > 0 else 0,
                seed=None if seed is None or temperature == 0 else seed + index,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for index, sequence in enumerate(sequences)
        ]
        found = []
        for output in self._run(sequences, parameters):
            tokens = list(output.outputs[0].token_ids)
            finished = output.outputs[0].finish_reason == "stop"
            if tokens and (tokens[-1] in self._stop_ids or finished):
                tokens.pop()  # vLLM keeps the end-of-response token in token_ids
            found.append((tokens, finished))
        return found

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[torch.Tensor]:
        """Returns log-probabilities of given responses. For a few short sequences: logits of whole prompts are made."""
        from vllm import SamplingParams

        # vLLM refuses to generate no token at all. These requests are never answered from the prefix cache.
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        # vLLM (seen in 0.32) ranks the tokens in a function that torch would compile at first use, for seconds, and not
        # at all on a machine without a compiler.
        with torch.compiler.set_stance("force_eager"):
            outputs = self._run([tokens for tokens, _ in sequences], parameters)
        return [
            torch.tensor([output.prompt_logprobs[t][tokens[t]].logprob for t in range(num_prompt, len(tokens))])
            for output, (tokens, num_prompt) in zip(outputs, sequences, strict=True)
        ]

    def check_decoding(self) -> float:
        """Compares the log-probabilities of decoding with those of reading: a CUDA graph may still use old weights.

        The trainer's proof after an update reads a probe as a prompt, and prompts are read without graphs.
        """
        from vllm import SamplingParams

        probe = [list(range(start, start + _PROBE_TOKENS)) for start in (1, 11, 21, 31)]
        parameters = SamplingParams(
            max_tokens=_PROBE_TOKENS, temperature=0.0, logprobs=0, ignore_eos=True, detokenize=False
        )
        sequences, decoded = [], []
        for tokens, output in zip(probe, self._run(probe, parameters), strict=True):
            answer = output.outputs[0]
            sequences.append(([*tokens, *answer.token_ids], len(tokens)))
            found = zip(answer.token_ids, answer.logprobs, strict=True)
            decoded.append(torch.tensor([logprobs[token].logprob for token, logprobs in found]))
        read = self.log_probs(sequences)
        difference = float((torch.cat(decoded) - torch.cat(read)).abs().mean())
        if not difference <= DECODING_TOLERANCE[self._spec.dtype]:  # written so that NaN fails too
            raise WorkError(
                f"After an update of the weights, decoding is {difference:.3g} nats from what the same weights say of "
                "the same tokens, so its CUDA graphs use others.",
                "Report it with the versions of vLLM and CUDA: `raycomplete doctor --gpu` repeats the comparison.",
            )
        return difference

    def _run(self, sequences: Sequence[Sequence[int]], parameters: Any) -> Any:
        from vllm import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        with self.awake():
            return self._llm.generate(inputs, parameters, use_tqdm=False)

    @contextmanager
    def _readable(self, weights: str | Weights, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yields the arguments with which vLLM reads the weights, which were not sent."""
        if isinstance(weights, str):
            yield {"weights_path": weights}
            return
        tensors = checkpoint_tensors(weights, TORCH_DTYPES[self._spec.dtype], tied=self._tied, timeout_s=timeout_s)
        if self._spec.tensor_parallel == 1:
            yield {"weights_iterator": tensors}
            return
        with checkpoint_folder(tensors) as folder:  # the shards of this engine are other processes
            yield {"weights_path": folder}

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Wakes an engine that sleeps between its calls, for the time of the block."""
        if not self._spec.sleeps:
            yield
            return
        with turn_of(self._spec):
            self._llm.wake_up()
        try:
            yield
        finally:
            with turn_of(self._spec):
                self._llm.sleep(level=1)


def _refresh_tied_head(model: Any) -> None:
    """Points a tied output head at the embedding again and packs it anew.

    On a CPU, vLLM (seen in 0.32) packs linear weights for its kernels after loading. A checkpoint with tied weights has
    no tensor for the head, so a reload leaves the head packed from the old embedding: the new model then speaks with
    the old model's head, without a word of warning.
    """
    if found := tied_head(model):
        head, embedding = found
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


@dataclass(frozen=True)
class RolloutOptions:
    """Settings of a rollout actor; `rollout` holds the number of engines, waits and tolerances."""

    spec: EngineSpec
    stop_ids: tuple[int, ...]
    rollout: RolloutConfig


@dataclass(frozen=True)
class EngineAnswer:
    """The responses or log-probabilities of one call to a rollout actor, with what they cost."""

    value: Any
    version: int | None  # of the weights in the engine; None for a checkpoint
    incarnation: str  # names the process: another one after a restart
    seconds: float  # in the engine, loading left out
    load_s: float  # 0 where the weights were there already


class RolloutWorker:
    """One generating engine. `RolloutPool` runs it as a Ray actor.

    The engine starts at the first call rather than in the constructor: an error in an actor's constructor reaches its
    caller as text only, and a restarted actor starts its engine anew by itself. Every call names the weights that it
    needs, so a restarted actor can never answer with the wrong model.
    """

    def __init__(self, options: RolloutOptions) -> None:
        begin("rollout engine")
        self._options = options
        self._engine: RolloutEngine | None = None
        self._start_s = 0.0
        self._incarnation = uuid.uuid4().hex

    def startup_stats(self) -> dict[str, Any]:
        """Returns start-up time and incarnation; an answer means that the actor is ready."""
        self._ready_engine()
        return {"start_s": self._start_s, "incarnation": self._incarnation}

    def generate(self, weights: WeightSource, sequences: list[list[int]], sampling: Sampling) -> EngineAnswer:
        """Continues sequences with these weights, loading them first if others are in the engine."""
        engine, load_s = self._engine_with(weights)
        started = time.perf_counter()
        responses = engine.generate_finished(sequences, sampling)
        seconds = time.perf_counter() - started
        record("rollout_tokens", sum(len(tokens) for tokens, _ in responses))
        record("rollout_seconds", seconds)
        return EngineAnswer(responses, engine.version, self._incarnation, seconds, load_s)

    def log_probs(self, weights: WeightSource, sequences: list[tuple[list[int], int]]) -> EngineAnswer:
        """Returns log-probabilities of responses under these weights (see `RolloutEngine.log_probs`)."""
        engine, load_s = self._engine_with(weights)
        started = time.perf_counter()
        log_probs = engine.log_probs(sequences)
        return EngineAnswer(log_probs, engine.version, self._incarnation, time.perf_counter() - started, load_s)

    def place(self) -> EnginePlace:
        return EnginePlace(self._incarnation, self._ready_engine().devices())

    def take_step(self, incarnation: str, step: TransferStep, *arguments: Any) -> None:
        """Takes one step of a transfer, a method of `RolloutEngine`."""
        engine = self._engine
        if engine is None or incarnation != self._incarnation:
            raise WeightsLostError("The engine was started again during a transfer of weights.")
        try:
            getattr(engine, step)(*arguments)
        except BaseException:
            if not engine.is_whole:
                self._drop()
            raise

    def _engine_with(self, weights: WeightSource) -> tuple[RolloutEngine, float]:
        engine = self._ready_engine()
        started = time.perf_counter()
        try:
            loaded = engine.load(weights, timeout_s=SYNC_TIMEOUT_S)
        finally:
            if not engine.is_whole:
                self._drop()
        if not loaded:
            return engine, 0.0
        seconds = time.perf_counter() - started
        record("weight_load_seconds", seconds)
        return engine, seconds

    def _drop(self) -> None:
        engine, self._engine = self._engine, None  # the next call starts a new one
        with suppress(Exception):  # which would hide why a load failed
            if engine is not None:
                engine.shut_down()

    def _ready_engine(self) -> RolloutEngine:
        if self._engine is not None and not self._engine.is_whole:
            self._drop()  # its trainer left in the middle of a transfer
        if self._engine is None:
            started = time.perf_counter()
            self._engine = RolloutEngine(self._options.spec, self._options.stop_ids)
            self._start_s = time.perf_counter() - started
        return self._engine
