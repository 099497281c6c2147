"""Seconds of one step's work by role, on the devices that it has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycomplete.config import Dtype, TrainConfig
from raycomplete.plan.hardware import Hardware
from raycomplete.plan.memory import MAX_SEQUENCES, chunk_rows, kv_split
from raycomplete.plan.shapes import DTYPE_BYTES, ModelShape
from raycomplete.plan.workload import Sequences, Workload


@dataclass(frozen=True)
class Factors:
    """What no data sheet says.

    Attributes:
        train_share: What forward and backward reach of an engine's share of the peak.
        cpu_train_share: The same on a CPU, whose peak is that of one large product; fitted to the organism's step.
        loss_share: Share of the peak in the loss's products, which are large and few: 52 ms of products at N 8192,
            V 128256, H 4096, two teachers.
        bandwidth_share: Share of memory bandwidth that reading weights and caches reaches.
        link_share: Share of a link that collectives reach.
        engine_calls: Kernel launches of a layer in vLLM's eager mode.
        train_calls: The same in transformers, forward.
        request_s: Host time of an engine for one scored sequence. From H100, 8B shape: 39.6 k tokens/s with hidden
            states against 42.9 k alone, over 64 sequences.
        decode_call_s: Host time of an engine for one decoding step.
        optimizer_bytes: Memory traffic of AdamW and gradient clipping, for each trained parameter; fitted to
            the organism's step.
        object_store_bandwidth: A copy into shared memory.
    """

    train_share: float = 0.75
    cpu_train_share: float = 0.5
    loss_share: float = 0.83
    bandwidth_share: float = 0.7
    link_share: float = 0.7
    engine_calls: int = 12
    train_calls: int = 45
    request_s: float = 1.65e-3
    decode_call_s: float = 3e-3
    optimizer_bytes: float = 100.0
    object_store_bandwidth: float = 5e9


@dataclass(frozen=True)
class Network:
    """Between nodes, for Ray's object store (TCP), bytes a second of one node."""

    bandwidth: float


def device_s(hardware: Hardware, flops: float, moved: float, calls: float, share: float, dtype: Dtype) -> float:
    """Products, then what is only moved, with launches hidden behind them on a GPU and added on a CPU."""
    busy = flops / (hardware.flops(dtype) * share) + moved / hardware.memory_bandwidth
    launched = calls * hardware.call_s
    return max(busy, launched) if hardware.is_gpu else busy + launched


def prefill_s(
    shape: ModelShape,
    hardware: Hardware,
    factors: Factors,
    groups: tuple[Sequences, ...],
    *,
    dtype: Dtype,
    parallel: int = 1,
    batched_tokens: int = 8192,
) -> float:
    """Reading sequences with an engine of `parallel` devices, without what is sent back."""
    tokens = sum(item.tokens for item in groups)
    if tokens == 0:
        return 0.0
    flops = sum(shape.forward_flops(item.tokens, item.length / 2) for item in groups) / parallel
    passes = math.ceil(tokens / batched_tokens)
    weights = passes * shape.body_parameters * DTYPE_BYTES[dtype] / parallel
    moved = tokens * shape.num_layers * shape.activation_bytes_per_token(dtype) / parallel + weights
    calls = passes * shape.num_layers * factors.engine_calls
    reduced = tensor_parallel_s(shape, hardware, factors, tokens, dtype, parallel)
    return device_s(hardware, flops, moved, calls, hardware.product_share, dtype) + reduced


def scoring_s(
    shape: ModelShape,
    hardware: Hardware,
    factors: Factors,
    groups: tuple[Sequences, ...],
    *,
    dtype: Dtype,
    parallel: int = 1,
    batched_tokens: int = 8192,
) -> float:
    """Reading, copying the states of all tokens to the host, and response rows into the object store."""
    row = shape.hidden_bytes_per_token(dtype)
    copied = sum(item.tokens for item in groups) * row / hardware.copy_bandwidth
    stored = sum(item.rows for item in groups) * row / factors.object_store_bandwidth
    requests = sum(item.count for item in groups) * factors.request_s
    read = prefill_s(shape, hardware, factors, groups, dtype=dtype, parallel=parallel, batched_tokens=batched_tokens)
    return read + copied + stored + requests


def rollout_s(
    shape: ModelShape,
    hardware: Hardware,
    factors: Factors,
    rollouts: Sequences,
    *,
    dtype: Dtype,
    engines: int,
    parallel: int = 1,
    batched_tokens: int = 8192,
) -> float:
    """Prefill, then for each new token a pass over weights and cached keys, or its products where they take longer."""
    share = Sequences(rollouts.count / engines, rollouts.prompt, 1)
    first = prefill_s(shape, hardware, factors, (share,), dtype=dtype, parallel=parallel, batched_tokens=batched_tokens)
    seconds, left = first, share.count
    while left > 0:
        running = min(left, MAX_SEQUENCES)
        seconds += rollouts.response * decode_step_s(
            shape, hardware, factors, running, rollouts.prompt + rollouts.response / 2, dtype=dtype, parallel=parallel
        )
        left -= running
    return seconds


def decode_step_s(
    shape: ModelShape,
    hardware: Hardware,
    factors: Factors,
    running: float,
    context: float,
    *,
    dtype: Dtype,
    parallel: int = 1,
) -> float:
    """One token of each running sequence."""
    weights = (shape.body_parameters + shape.head_parameters) * DTYPE_BYTES[dtype] / parallel
    cache = running * context * shape.kv_bytes_per_token(dtype) / kv_split(shape, parallel)
    read = (weights + cache) / (hardware.memory_bandwidth * factors.bandwidth_share)
    flops = (shape.forward_flops(running, context) + 2.0 * running * shape.head_parameters) / parallel
    launched = shape.num_layers * factors.engine_calls * hardware.call_s + factors.decode_call_s
    products = flops / (hardware.flops(dtype) * hardware.product_share)
    reduced = tensor_parallel_s(shape, hardware, factors, running, dtype, parallel)
    # Launches and host work of an eager step come before its kernels end only where these are long.
    return max(read, products, launched) + reduced if hardware.is_gpu else max(read, products) + launched


def tensor_parallel_s(
    shape: ModelShape, hardware: Hardware, factors: Factors, tokens: float, dtype: Dtype, parallel: int
) -> float:
    """Two all-reduces of the residual stream in each layer."""
    if parallel == 1:
        return 0.0
    moved = 2 * shape.num_layers * 2 * (parallel - 1) / parallel * tokens * shape.hidden_bytes_per_token(dtype)
    return moved / (hardware.link_bandwidth * factors.link_share)


def loss_s(
    train: TrainConfig,
    hardware: Hardware,
    factors: Factors,
    rows: float,
    base_rows: float,
    shapes: dict[str, ModelShape],
    dtype: Dtype,
) -> float:
    """The completion loss of one worker: 5 products of V x H a row where base is needed, 4 elsewhere."""
    if rows == 0:
        return 0.0
    student = shapes["student"]
    vocab = student.vocab_size
    student_products = 2 if train.lora_rank else 3  # a frozen head has no gradient of its own
    widths = rows * (student_products * student.hidden_size + shapes["aligned"].hidden_size)
    widths += base_rows * shapes["base"].hidden_size
    products = 2.0 * vocab * widths / (hardware.flops(dtype) * loss_share(hardware, factors))
    elements = vocab * (2 * rows + base_rows) / hardware.elements_per_s
    chunks = math.ceil(rows / chunk_rows(train, vocab, dtype, is_gpu=hardware.is_gpu))
    summed = 0.0 if train.lora_rank else chunks * student.head_parameters * 10.0 / hardware.memory_bandwidth
    return products + elements + summed


def loss_share(hardware: Hardware, factors: Factors) -> float:
    """Share of the peak; on a measured CPU the peak is what products reach."""
    return factors.loss_share if hardware.is_gpu else hardware.product_share


def train_share(hardware: Hardware, factors: Factors) -> float:
    """Share of the peak that forward and backward reach."""
    return hardware.product_share * (factors.train_share if hardware.is_gpu else factors.cpu_train_share)


def train_s(
    train: TrainConfig,
    hardware: Hardware,
    factors: Factors,
    work: Workload,
    shapes: dict[str, ModelShape],
    *,
    dtype: Dtype,
    workers: int,
    gpus_per_node: int,
) -> dict[str, float]:
    """One optimizer step of `workers` data-parallel workers, by what takes the time."""
    student = shapes["student"]
    recomputed = train.gradient_checkpointing
    passes = 4 if recomputed else 3  # forward, and backward at twice its cost
    tokens = sum(item.tokens for item in work.trained) / workers
    flops = passes * sum(student.forward_flops(item.tokens, item.length / 2) for item in work.trained) / workers
    if train.lora_rank:  # frozen weights need no gradient of their own: one of backward's two products
        flops *= (passes - 1) / passes
    # Unfused operations write and read what they keep, in each pass.
    moved = passes * 2 * tokens * student.num_layers * student.activation_bytes_per_token(dtype)
    calls = passes * work.micro_batches * student.num_layers * factors.train_calls
    share = train_share(hardware, factors)
    parameters = float(student.num_parameters)
    trainable = float(student.lora_parameters(train.lora_rank)) if train.lora_rank else parameters
    stage = max(train.zero_stage, 1) if dtype == "bfloat16" else train.zero_stage
    updated = trainable / workers if stage >= 1 else trainable
    added = work.micro_batches * trainable * 10.0  # read a gradient, add it to the float32 sum
    size = DTYPE_BYTES[dtype]
    loss_rows = (work.loss_rows / workers, work.base_rows / workers)
    return {
        "forward and backward": device_s(hardware, flops, moved, calls, share, dtype),
        "loss": loss_s(train, hardware, factors, *loss_rows, shapes, dtype),
        "optimizer": (updated * factors.optimizer_bytes + added) / hardware.memory_bandwidth,
        "collectives": collectives_s(
            hardware, factors, parameters * size, trainable * size, stage, workers, gpus_per_node, work.micro_batches
        ),
    }


def collectives_s(
    hardware: Hardware,
    factors: Factors,
    weights: float,
    gradients: float,
    stage: int,
    workers: int,
    gpus_per_node: int,
    micro_batches: int,
) -> float:
    """Ring collectives that nothing hides: two volumes of the model a step, and at stage 3 weights twice a pass."""
    if workers == 1:
        return 0.0
    bandwidth = hardware.link_bandwidth if workers <= gpus_per_node else hardware.fabric_bandwidth
    volume = 2 * gradients
    if stage == 2:  # gradients are scattered after every pass
        volume = (micro_batches + 1) * gradients
    if stage == 3:
        volume = micro_batches * (2 * weights + gradients)
    return volume * (workers - 1) / workers / (bandwidth * factors.link_share)


def fetch_s(
    work: Workload, shapes: dict[str, ModelShape], dtype: Dtype, network: Network, nodes: int, train_nodes: int
) -> float:
    """Hidden states of a step on their way to the trainer's nodes; within one node they are shared memory."""
    moved = sum(work.payload_rows(role) * shapes[role].hidden_bytes_per_token(dtype) for role in work.scored)
    return 0.0 if nodes == 1 else moved / (network.bandwidth * train_nodes)


def sync_bytes(student: ModelShape, train: TrainConfig, dtype: Dtype) -> float:
    """What one update of the engines' weights carries."""
    if train.lora_rank:
        return float(student.lora_parameters(train.lora_rank)) * 4.0
    return float(student.num_parameters) * DTYPE_BYTES[dtype]


def sync_s(
    moved: float, hardware: Hardware, factors: Factors, network: Network, *, engine_nodes: int, nodes: int
) -> float:
    """Gathered to one host, put into the object store, sent to each node with engines, loaded by them."""
    sent = 0.0 if nodes == 1 else engine_nodes * moved / network.bandwidth
    return 2 * moved / hardware.copy_bandwidth + moved / factors.object_store_bandwidth + sent
