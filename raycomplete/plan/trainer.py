"""Seconds and memory of training workers: forward, backward, loss, optimizer, collectives and what they keep."""

from __future__ import annotations

import math

from raycomplete.config import Dtype, TrainConfig
from raycomplete.plan.catalogue import DTYPE_BYTES, GIB, WORKER_GIB, Hardware
from raycomplete.plan.workload import Request, Workload

# The loss keeps one model's logits of a chunk within these budgets, by whether it runs on a GPU
# (raycomplete.losses.chunked_pass).
_CHUNK_BUDGET = {True: 512 * 2**20, False: 48 * 2**20}
_CHUNK_MULTIPLE = 64


def states_bytes(
    parameters: float, dtype: Dtype, stage: int, workers: int, trainable: float | None = None
) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's states of one worker under ZeRO; all weights are trainable by default.

    As in the ZeRO paper (arXiv 1910.02054), with this trainer's sizes: bfloat16 weights have float32 gradients and
    4 + 4 + 4 bytes of master weight and moments; float32 weights have no master. Stage 1 shards the optimizer, stage 2
    gradients too, stage 3 weights too; in bfloat16 stage 0 runs as stage 1.
    """
    stage = max(stage, 1) if dtype == "bfloat16" else stage
    trainable = parameters if trainable is None else trainable
    adam = 12.0 if dtype == "bfloat16" else 8.0
    share = 1 / workers
    return {
        "weights": parameters * DTYPE_BYTES[dtype] * (share if stage >= 3 else 1),
        "gradients": trainable * 4.0 * (share if stage >= 2 else 1),
        "optimizer": trainable * adam * (share if stage >= 1 else 1),
    }


def chunk_rows(train: TrainConfig, vocab_size: int, dtype: Dtype, *, is_gpu: bool) -> int:
    """Token rows whose logits exist at a time, by the rule of `raycomplete.losses.chunked_pass.rows_per_chunk`."""
    if train.loss_chunk_tokens != "auto":
        return train.loss_chunk_tokens
    rows = _CHUNK_BUDGET[is_gpu] // (vocab_size * DTYPE_BYTES[dtype])
    return max(rows // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, min(rows, _CHUNK_MULTIPLE), 1)


def loss_bytes(request: Request, work: Workload, workers: int) -> dict[str, float]:
    """Logits of a chunk with hidden states, and the gradient of the head while it is summed and handed on."""
    train, shapes, size = request.train, request.shapes, DTYPE_BYTES[request.dtype]
    student, per_pass = shapes["student"], 1 / (workers * work.micro_batches)
    rows, base_rows = work.loss_rows * per_pass, work.base_rows * per_pass
    chunk = min(chunk_rows(train, student.vocab_size, request.dtype, is_gpu=request.hardware.is_gpu), rows)
    logits = (2 * chunk + min(chunk, base_rows)) * student.vocab_size * size
    hidden = rows * (2 * student.hidden_size + shapes["aligned"].hidden_size) + base_rows * shapes["base"].hidden_size
    # A sum in float32 and its copy in the head's dtype, or, where they are one, that and what backward scales. LoRA
    # leaves the head frozen and needs none.
    head_gradient = 0.0 if train.lora_rank else student.head_parameters * (4.0 + (size if size == 2 else 4.0))
    return {"loss chunk": logits + hidden * size, "head gradient": head_gradient}


def worker_memory(request: Request, workers: int) -> dict[str, float]:
    """Bytes of one worker: states, frozen heads (whole on every worker), activations, the loss's buffers."""
    train, dtype, shapes, work = request.train, request.dtype, request.shapes, request.workload(workers)
    student, size = shapes["student"], DTYPE_BYTES[request.dtype]
    trainable = float(student.lora_parameters(train.lora_rank)) if train.lora_rank else None
    parts = states_bytes(student.num_parameters + (trainable or 0.0), dtype, train.zero_stage, workers, trainable)
    if train.zero_stage == 3:  # one layer and, around the loss, the head are gathered
        parts["gathered"] = (student.head_parameters + student.body_parameters / student.num_layers) * size
    parts["frozen heads"] = (shapes["aligned"].head_parameters + shapes["base"].head_parameters) * float(size)
    tokens = sum(item.tokens for item in work.trained) / (workers * work.micro_batches)
    layer_bytes = student.activation_bytes_per_token(dtype)
    recomputed = student.num_layers * student.hidden_bytes_per_token(dtype) + layer_bytes
    parts["activations"] = tokens * (recomputed if train.gradient_checkpointing else student.num_layers * layer_bytes)
    parts |= loss_bytes(request, work, workers)
    return parts if request.hardware.is_gpu else parts | {"process": WORKER_GIB * GIB}


def train_parts(request: Request, workers: int, work: Workload | None = None) -> dict[str, float]:
    """Seconds of one optimizer step of data-parallel workers by what takes them; of the run file's, or of `work`."""
    train, hardware, dtype, student = request.train, request.hardware, request.dtype, request.shapes["student"]
    work = work or request.workload(workers)
    forwards = 4 if train.gradient_checkpointing else 3  # forward, perhaps again, and backward at twice its cost
    passes = forwards * work.passes
    tokens = sum(item.tokens for item in work.trained) / workers
    flops = passes * sum(student.forward_flops(item.tokens, item.length / 2) for item in work.trained) / workers
    if train.lora_rank:  # frozen weights need no gradient of their own: one of backward's two products
        flops *= (forwards - 1) / forwards
    # Unfused operations write and read what they keep, in each pass.
    moved = passes * 2 * tokens * student.num_layers * student.activation_bytes_per_token(dtype)
    calls = forwards * work.launches * work.micro_batches * student.num_layers * hardware.train_calls
    parameters = float(student.num_parameters)
    trainable = float(student.lora_parameters(train.lora_rank)) if train.lora_rank else parameters
    stage = max(train.zero_stage, 1) if dtype == "bfloat16" else train.zero_stage
    updated = trainable / workers if stage >= 1 else trainable
    added = work.micro_batches * trainable * 10.0  # read a gradient, add it to the float32 sum
    size, volume = DTYPE_BYTES[dtype], (request.devices_per_node, work.micro_batches)
    return {
        "forward and backward": hardware.busy_s(flops, moved, calls, hardware.train_share, dtype),
        "loss": loss_s(request, work.loss_rows / workers, work.base_rows / workers),
        "optimizer": (updated * hardware.optimizer_bytes + added) / hardware.memory_bandwidth,
        "collectives": collectives_s(hardware, parameters * size, trainable * size, stage, workers, *volume),
    }


def loss_s(request: Request, rows: float, base_rows: float) -> float:
    """Seconds of one worker's loss: 5 products of V x H a row where base is needed, 4 elsewhere."""
    if rows == 0:
        return 0.0
    train, hardware, dtype, shapes = request.train, request.hardware, request.dtype, request.shapes
    student = shapes["student"]
    vocab = student.vocab_size
    student_products = 2 if train.lora_rank else 3  # a frozen head has no gradient of its own
    widths = rows * (student_products * student.hidden_size + shapes["aligned"].hidden_size)
    widths += base_rows * shapes["base"].hidden_size
    products = 2.0 * vocab * widths / (hardware.flops(dtype) * hardware.loss_share)
    elements = vocab * (2 * rows + base_rows) / hardware.elements_per_s
    chunks = math.ceil(rows / chunk_rows(train, vocab, dtype, is_gpu=hardware.is_gpu))
    summed = 0.0 if train.lora_rank else chunks * student.head_parameters * 10.0 / hardware.memory_bandwidth
    return products + elements + summed


def collectives_s(
    hardware: Hardware, weights: float, gradients: float, stage: int, workers: int, per_node: int, micro_batches: int
) -> float:
    """Seconds of ring collectives that nothing hides, of `weights` and `gradients` bytes.

    Two volumes of the gradients a step; at stage 2 they are scattered after every pass, and at stage 3 weights are
    gathered twice a pass.
    """
    if workers == 1:
        return 0.0
    bandwidth = hardware.link_bandwidth if workers <= per_node else hardware.fabric_bandwidth
    volumes = {2: (micro_batches + 1) * gradients, 3: micro_batches * (2 * weights + gradients)}
    volume = volumes.get(stage, 2 * gradients)
    return volume * (workers - 1) / workers / (bandwidth * hardware.link_share)
