"""Memory of one device, by role and by what fills it."""

from __future__ import annotations

from dataclasses import dataclass

from raycomplete.config import Dtype, TrainConfig
from raycomplete.plan.hardware import Hardware
from raycomplete.plan.shapes import DTYPE_BYTES, ModelShape
from raycomplete.plan.workload import Sequences, Workload

RESERVED_SHARE = 0.08  # of a device: CUDA context, fragmentation, communication buffers
# The loss keeps one model's logits of a chunk within these budgets (raycomplete.losses.chunks).
_CHUNK_BUDGET = {True: 512 * 2**20, False: 48 * 2**20}
_CHUNK_MULTIPLE = 64
MAX_SEQUENCES = 256  # that an engine works on at a time


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on one device.

    Attributes:
        role: Whose.
        parts: Bytes by what fills them.
    """

    role: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def states_bytes(
    parameters: float, dtype: Dtype, stage: int, workers: int, trainable: float | None = None
) -> dict[str, float]:
    """Weights, gradients and AdamW's states of one worker under ZeRO.

    As in the ZeRO paper (arXiv 1910.02054), with this trainer's sizes: bfloat16 weights have float32 gradients and
    4 + 4 + 4 bytes of master weight and moments; float32 weights have no master. Stage 1 shards the optimizer, stage 2
    gradients too, stage 3 weights too; in bfloat16 stage 0 runs as stage 1.

    Args:
        parameters: Of the student.
        dtype: Of its weights.
        stage: `train.zero_stage`.
        workers: Data-parallel workers.
        trainable: Of them, trained ones; all when absent.
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
    """Token rows whose logits exist at a time, by the rule of `raycomplete.losses.chunks.rows_per_chunk`."""
    if train.loss_chunk_tokens != "auto":
        return train.loss_chunk_tokens
    rows = _CHUNK_BUDGET[is_gpu] // (vocab_size * DTYPE_BYTES[dtype])
    return max(rows // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, min(rows, _CHUNK_MULTIPLE), 1)


def loss_bytes(
    train: TrainConfig, work: Workload, shapes: dict[str, ModelShape], dtype: Dtype, workers: int, *, is_gpu: bool
) -> dict[str, float]:
    """Logits of a chunk, hidden states, and the gradient of the head while it is summed and handed on."""
    size, student = DTYPE_BYTES[dtype], shapes["student"]
    per_pass = 1 / (workers * work.micro_batches)
    rows, base_rows = work.loss_rows * per_pass, work.base_rows * per_pass
    chunk = min(chunk_rows(train, student.vocab_size, dtype, is_gpu=is_gpu), rows)
    logits = (2 * chunk + min(chunk, base_rows)) * student.vocab_size * size
    hidden = rows * (2 * student.hidden_size + shapes["aligned"].hidden_size) + base_rows * shapes["base"].hidden_size
    # A sum in float32 and its copy in the head's dtype, or, where they are one, that and what backward scales. LoRA
    # leaves the head frozen and needs none.
    head_gradient = 0.0 if train.lora_rank else student.head_parameters * (4.0 + (size if size == 2 else 4.0))
    return {"loss chunk": logits + hidden * size, "head gradient": head_gradient}


def worker_memory(
    train: TrainConfig, work: Workload, shapes: dict[str, ModelShape], dtype: Dtype, workers: int, *, is_gpu: bool
) -> Memory:
    """One training worker: states, frozen heads (whole on every worker), activations, the loss's buffers."""
    student = shapes["student"]
    trainable = float(student.lora_parameters(train.lora_rank)) if train.lora_rank else None
    parameters = student.num_parameters + (trainable or 0.0)
    parts = states_bytes(parameters, dtype, train.zero_stage, workers, trainable)
    if train.zero_stage == 3:  # one layer and, around the loss, the head are gathered
        layer = student.body_parameters / student.num_layers
        parts["gathered"] = (student.head_parameters + layer) * DTYPE_BYTES[dtype]
    heads = shapes["aligned"].head_parameters + shapes["base"].head_parameters
    parts["frozen heads"] = heads * float(DTYPE_BYTES[dtype])
    tokens = sum(item.tokens for item in work.trained) / (workers * work.micro_batches)
    layer_bytes = student.activation_bytes_per_token(dtype)
    kept = student.num_layers * student.hidden_bytes_per_token(dtype) + layer_bytes
    parts["activations"] = tokens * (kept if train.gradient_checkpointing else student.num_layers * layer_bytes)
    return Memory("training worker", parts | loss_bytes(train, work, shapes, dtype, workers, is_gpu=is_gpu))


def pooling_memory(shape: ModelShape, dtype: Dtype, batched_tokens: int, parallel: int) -> Memory:
    """One device of a pooling engine: it carries no output head, and its cache holds the batch that it reads."""
    weights = (shape.body_parameters + shape.head_parameters) * DTYPE_BYTES[dtype] / parallel
    return Memory(
        "scorer",
        {
            "weights": weights,
            "KV cache": batched_tokens * shape.kv_bytes_per_token(dtype) / kv_split(shape, parallel),
            "activations": _inference_bytes(shape, dtype, batched_tokens, parallel)
            + batched_tokens * shape.hidden_size * 4.0,  # the states that are handed out, in float32
        },
    )


def rollout_memory(
    shape: ModelShape, dtype: Dtype, rollouts: Sequences, batched_tokens: int, engines: int, parallel: int
) -> Memory:
    """One device of a rollout engine: weights with the head, and keys and values of what it writes at a time."""
    running = min(rollouts.count / engines, MAX_SEQUENCES)
    tokens = running * (rollouts.prompt + rollouts.response)
    logits = running * shape.vocab_size * 4.0
    return Memory(
        "rollout engine",
        {
            "weights": shape.num_parameters * DTYPE_BYTES[dtype] / parallel,
            "KV cache": tokens * shape.kv_bytes_per_token(dtype) / kv_split(shape, parallel),
            "activations": _inference_bytes(shape, dtype, batched_tokens, parallel) + logits,
        },
    )


def kv_split(shape: ModelShape, parallel: int) -> int:
    """Over how many devices keys and values are spread: a key-value head is never cut."""
    return min(parallel, shape.num_kv_heads)


def usable(hardware: Hardware) -> float:
    """Bytes of a device that a plan may fill."""
    return hardware.memory_bytes * (1 - RESERVED_SHARE)


def _inference_bytes(shape: ModelShape, dtype: Dtype, tokens: int, parallel: int) -> float:
    """Residual stream twice, query with keys and values, gate and up, for one layer of one batch."""
    widths = 2 * shape.hidden_size + (shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate_size) / parallel
    return tokens * widths * float(DTYPE_BYTES[dtype])
