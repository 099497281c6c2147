"""Seconds and memory of engines: scoring by the frozen models, rollouts of the student, and transfers to and from them.

Activations of inference count one layer of one batch: residual stream twice, query with keys and values, gate and up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raycomplete.config import Dtype
from raycomplete.plan.catalogue import DTYPE_BYTES, ENGINE_GIB, GIB, Hardware, ModelShape
from raycomplete.plan.workload import Layout, Request, Sequences, Workload

MAX_SEQUENCES = 256  # that an engine works on at a time


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of a plan, spread over `parallel` devices; it reads `batched_tokens` in one pass."""

    shape: ModelShape
    hardware: Hardware
    dtype: Dtype
    parallel: int = 1
    batched_tokens: int = 8192

    def prefill_s(self, groups: tuple[Sequences, ...]) -> float:
        """Seconds to read sequences, without what is sent back."""
        shape, parallel = self.shape, self.parallel
        tokens = sum(item.tokens for item in groups)
        if tokens == 0:
            return 0.0
        flops = sum(shape.forward_flops(item.tokens, item.length / 2) for item in groups) / parallel
        passes = math.ceil(tokens / self.batched_tokens)
        weights = passes * shape.body_parameters * DTYPE_BYTES[self.dtype] / parallel
        moved = tokens * shape.num_layers * shape.activation_bytes_per_token(self.dtype) / parallel + weights
        calls = passes * shape.num_layers * self.hardware.engine_calls
        busy = self.hardware.busy_s(flops, moved, calls, self.hardware.product_share, self.dtype)
        return busy + self.reduce_s(tokens)

    def scoring_s(self, groups: tuple[Sequences, ...]) -> float:
        """Seconds to read, to copy the states of all tokens to the host, and response rows into the object store."""
        row = self.shape.hidden_bytes_per_token(self.dtype)
        copied = sum(item.tokens for item in groups) * row / self.hardware.copy_bandwidth
        stored = sum(item.rows for item in groups) * row / self.hardware.object_store_bandwidth
        requests = sum(item.count for item in groups) * self.hardware.request_s
        return self.prefill_s(groups) + copied + stored + requests

    def rollout_s(self, rollouts: Sequences) -> float:
        """Seconds of prefill, then of a decoding step for each new token of as many sequences as run at a time."""
        seconds, left = self.prefill_s((replace(rollouts, response=1),)), rollouts.count
        while left > 0:
            running = min(left, MAX_SEQUENCES)
            seconds += rollouts.response * self.decode_step_s(running, rollouts.prompt + rollouts.response / 2)
            left -= running
        return seconds

    def decode_step_s(self, running: float, context: float) -> float:
        """Seconds of one token of each running sequence, with `context` tokens before it on average.

        Weights and cached keys are read, or products take longer.
        """
        shape, hardware = self.shape, self.hardware
        weights = (shape.body_parameters + shape.head_parameters) * DTYPE_BYTES[self.dtype] / self.parallel
        cached = running * context * shape.kv_bytes_per_token(self.dtype) / self._kv_split
        read = (weights + cached) / (hardware.memory_bandwidth * hardware.bandwidth_share)
        flops = shape.forward_flops(running, context) + 2.0 * running * shape.head_parameters
        launched = shape.num_layers * hardware.engine_calls * hardware.call_s + hardware.decode_call_s
        products = flops / self.parallel / (hardware.flops(self.dtype) * hardware.product_share)
        # Launches and host work of an eager step come before its kernels end only where these are long.
        busy = max(read, products, launched) if hardware.is_gpu else max(read, products) + launched
        return busy + self.reduce_s(running)

    def reduce_s(self, tokens: float) -> float:
        """Seconds of the two all-reduces of the residual stream in each layer."""
        if self.parallel == 1:
            return 0.0
        volume = 2 * self.shape.num_layers * 2 * (self.parallel - 1) / self.parallel * tokens
        moved = volume * self.shape.hidden_bytes_per_token(self.dtype)
        return moved / (self.hardware.link_bandwidth * self.hardware.link_share)

    def scorer_memory(self) -> dict[str, float]:
        """Bytes of one device of a pooling engine: it has no output head, and its cache holds the batch it reads.

        On a CPU the cache has twice that room (`raycomplete.engines.scoring_engine.cache_bytes`).
        """
        shape, batched = self.shape, self.batched_tokens
        cached = batched if self.hardware.is_gpu else 2 * batched
        handed_out = batched * shape.hidden_size * 4.0  # states, in float32
        return {
            "weights": (shape.body_parameters + shape.head_parameters) * DTYPE_BYTES[self.dtype] / self.parallel,
            "KV cache": cached * shape.kv_bytes_per_token(self.dtype) / self._kv_split,
            "activations": self._activation_bytes + handed_out,
        }

    def rollout_memory(self, rollouts: Sequences) -> dict[str, float]:
        """Bytes of one device of a rollout engine: weights with the head, keys and values of what it writes."""
        running = min(rollouts.count, MAX_SEQUENCES)
        tokens = running * (rollouts.prompt + rollouts.response)
        logits = running * self.shape.vocab_size * 4.0
        return {
            "weights": self.shape.num_parameters * DTYPE_BYTES[self.dtype] / self.parallel,
            "KV cache": tokens * self.shape.kv_bytes_per_token(self.dtype) / self._kv_split,
            "activations": self._activation_bytes + logits,
        }

    @property
    def _kv_split(self) -> int:
        """Devices that keys and values are spread over: a key-value head is never cut."""
        return min(self.parallel, self.shape.num_kv_heads)

    @property
    def _activation_bytes(self) -> float:
        shape = self.shape
        split = (shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate_size) / self.parallel
        return self.batched_tokens * (2 * shape.hidden_size + split) * float(DTYPE_BYTES[self.dtype])


def engine_of(request: Request, role: str, parallel: int) -> PlannedEngine:
    """The engine of a role: "aligned", "base" or "rollout"."""
    shape = request.shapes["student" if role == "rollout" else role]
    batched_tokens = request.config.teacher.max_num_batched_tokens
    return PlannedEngine(shape, request.hardware, request.dtype, parallel, batched_tokens)


def engine_memory(request: Request, role: str, replicas: int, parallel: int) -> dict[str, float]:
    """Bytes of one device of one of a role's engines."""
    engine, rollouts = engine_of(request, role, parallel), request.workload(1).rollouts
    if role != "rollout" or rollouts is None:
        parts = engine.scorer_memory()
    else:
        parts = engine.rollout_memory(replace(rollouts, count=rollouts.count / replicas))
    return parts if request.hardware.is_gpu else parts | {"process": ENGINE_GIB * GIB}


def engine_s(request: Request, role: str, replicas: int, parallel: int) -> float:
    """Seconds of a role's work in one step, split evenly over its engines."""
    engine, work = engine_of(request, role, parallel), request.workload(1)
    if role == "rollout" and work.rollouts is not None:
        return engine.rollout_s(replace(work.rollouts, count=work.rollouts.count / replicas))
    return engine.scoring_s(tuple(replace(item, count=item.count / replicas) for item in work.scored[role]))


def payload_bytes(request: Request, work: Workload) -> dict[str, float]:
    """Hidden states of one step by frozen model that has work."""
    return {
        role: sum(item.rows for item in groups) * request.shapes[role].hidden_bytes_per_token(request.dtype)
        for role, groups in work.scored.items()
        if groups
    }


def fetch_s(request: Request, layout: Layout) -> float:
    """Seconds of a step's hidden states on their way to the trainer's nodes; within one node memory is shared."""
    train_nodes = math.ceil(layout.workers / request.devices_per_node)
    moved = sum(payload_bytes(request, request.workload(layout.workers)).values())
    return 0.0 if request.nodes == 1 else moved / (request.network_bandwidth * train_nodes)


def sync_bytes(request: Request) -> float:
    """Bytes of one update of the rollout engines' weights: adapters in float32, or all weights; 0 off-policy."""
    if not request.config.rollout.on_policy:
        return 0.0
    student = request.shapes["student"]
    if request.train.lora_rank:
        return float(student.lora_parameters(request.train.lora_rank)) * 4.0
    return float(student.num_parameters) * DTYPE_BYTES[request.dtype]


def sync_s(request: Request, engine_devices: int) -> float:
    """Seconds of one update: gathered to a host, put into the object store, sent to each node in turn, loaded there."""
    moved, hardware = sync_bytes(request), request.hardware
    engine_nodes = math.ceil(engine_devices / request.devices_per_node)
    sent = 0.0 if request.nodes == 1 else engine_nodes * moved / request.network_bandwidth
    return 2 * moved / hardware.copy_bandwidth + moved / hardware.object_store_bandwidth + sent
