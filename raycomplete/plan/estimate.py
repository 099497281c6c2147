"""Memory, devices, step time and cost of a run by formula, or the smallest change with which it fits.

Sizes are in bytes, times in seconds. The time of a role is one formula,

    operations / (devices x peak x share of the peak), or bytes of weights and caches / bandwidth while decoding,

and a step takes as long as its slowest role, or as all together on shared devices. Predicted and measured: an 8B scorer
on one H100 49 k and 39.6 k tokens/s; SmolLM2-135M on two CPU cores, on-policy, 132 and 127 trained tokens/s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from raycomplete.config import Dtype, RunConfig
from raycomplete.config.engines import OVERSAMPLE
from raycomplete.methods.completion import Completion
from raycomplete.plan.catalogue import DTYPE_BYTES, ENGINE_GIB, GIB, WORKER_GIB, Hardware, ModelShape
from raycomplete.runtime.errors import ConfigError, SetupError

FROZEN = ("aligned", "base")
RESERVED_SHARE = 0.08  # of a device, for CUDA, fragmentation and communication buffers
MAX_SEQUENCES = 256  # that a rollout engine decodes at a time
# Shares of the peak that products reach in engines (H100) and in training (set by SmolLM2 on a CPU), and of the memory
# bandwidth that decoding reaches.
_ENGINE_SHARE, _TRAIN_SHARE, _BANDWIDTH_SHARE = 0.7, 0.4, 0.7
_LARGEST_NODE = 16


@dataclass(frozen=True)
class Sequences:
    """Some number of sequences with `prompt` tokens before `response` tokens."""

    count: float
    prompt: float
    response: float

    @property
    def tokens(self) -> float:
        """Tokens that a model reads of all; the last one of each predicts nothing that is asked for."""
        return self.count * (self.prompt + self.response - 1)

    @property
    def rows(self) -> float:
        """Response tokens of all: a row of hidden states each."""
        return self.count * self.response

    def flops(self, shape: ModelShape) -> float:
        """Operations of reading all."""
        return shape.forward_flops(self.tokens, (self.prompt + self.response - 1) / 2)


@dataclass(frozen=True)
class Work:
    """One optimizer step over all workers."""

    trained: tuple[Sequences, ...]
    scored: dict[str, tuple[Sequences, ...]]
    rollouts: Sequences | None
    loss_rows: float
    base_rows: float
    passes: float

    @property
    def trained_tokens(self) -> float:
        """Tokens of the trained sequences, as metrics.jsonl counts them."""
        return sum(item.count * (item.prompt + item.response) for item in self.trained)


@dataclass(frozen=True)
class Request:
    """Run file, models by role (student, aligned, base) and hardware of a plan."""

    config: RunConfig
    shapes: dict[str, ModelShape]
    hardware: Hardware
    nodes: int = 1
    devices_per_node: int = 1
    price: float | None = None
    prompt_tokens: float = 64.0
    network_gbit: float = 50.0

    def __post_init__(self) -> None:
        flags: dict[str, float] = {"--nodes": self.nodes, "--gpus-per-node": self.devices_per_node}
        flags |= {"--prompt-tokens": self.prompt_tokens, "--network-gbit": self.network_gbit}
        for flag, value in flags.items():
            if value <= 0:
                raise ConfigError(f"{flag} must be positive, got {value}.")
        if self.price is not None and self.price < 0:
            raise ConfigError(f"The price must not be negative, got {self.price}.")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def dtype(self) -> Dtype:
        """Type of all weights; `auto` is the faster one on this hardware."""
        asked, hardware = self.config.models.dtype, self.hardware
        if asked != "auto":
            return asked
        return "bfloat16" if hardware.bfloat16_flops > hardware.float32_flops else "float32"

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device that a plan may fill."""
        return self.hardware.memory_bytes * (1 - RESERVED_SHARE)

    @property
    def engines(self) -> tuple[str, ...]:
        """Roles on engines: "aligned", "base" and, on-policy, "rollout"."""
        return (*FROZEN, "rollout") if self.config.rollout.on_policy else FROZEN

    @property
    def work(self) -> Work:
        """The expected step, with responses at their longest and depths at the middle of their range."""
        method, rollout, prompt = self.config.method, self.config.rollout, self.prompt_tokens
        contrastive = pushes = penalised = opens = False
        passes = 1.0 + method.extra_passes
        if isinstance(method, Completion):
            weights = method.weights
            contrastive, pushes = method.contrastive_alpha > 0, weights.push_forward > 0
            penalised, opens = weights.penalty > 0, weights.opening > 0
        depth = (method.depth.min + min(method.depth.max, rollout.max_harmful_tokens)) / 2
        anchors, recoveries = method.anchor_batch_size, method.recovery_batch_size
        anchor = Sequences(anchors, prompt, rollout.max_anchor_tokens)
        refusal = Sequences(recoveries, prompt, rollout.max_refusal_tokens)
        read = Sequences(recoveries * method.recovery_sequences, prompt, depth + rollout.max_refusal_tokens)
        if isinstance(method, Completion) and (steps := method.suffix_adversary.steps):
            # The adversary reads recovery samples with a suffix again, without gradients of weights: 2/3 of a pass.
            share = rollout.prompt_augmentation.share_of("recovery") * (1 - rollout.refusal_prefix_fraction)
            passes += steps * 2 / 3 * share * read.tokens / (anchor.tokens + read.tokens)
        base = (Sequences(recoveries, prompt, rollout.max_harmful_tokens),) if penalised else ()
        return Work(
            trained=(anchor, read),
            scored={"aligned": (anchor, refusal), "base": (*base, *((anchor, refusal) if contrastive else ()))},
            rollouts=Sequences(recoveries * OVERSAMPLE, prompt + depth, rollout.max_student_tokens)
            if rollout.on_policy
            else None,
            loss_rows=anchor.rows + refusal.rows + recoveries * ((pushes + penalised) * depth + opens),
            base_rows=contrastive * (anchor.rows + refusal.rows) + penalised * recoveries * depth,
            passes=passes,
        )


@dataclass(frozen=True)
class Layout:
    """Devices of each role: data-parallel workers, and engines over `parallel` devices each.

    Where `shared`, every device holds a worker and an engine of each role, which take turns.
    """

    workers: int
    replicas: dict[str, int]
    parallel: dict[str, int]
    shared: bool = False

    @property
    def devices(self) -> int:
        """Devices that are used."""
        if self.shared:
            return self.workers
        return self.workers + sum(count * self.parallel[role] for role, count in self.replicas.items())


def engine_name(role: str) -> str:
    return "rollout engine" if role == "rollout" else f"{role} scorer"


# --- memory ---


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
    return {
        "weights": parameters * DTYPE_BYTES[dtype] / (workers if stage >= 3 else 1),
        "gradients": trainable * 4.0 / (workers if stage >= 2 else 1),
        "optimizer": trainable * adam / (workers if stage >= 1 else 1),
    }


def chunk_rows(vocab_size: int, dtype: Dtype, *, is_gpu: bool) -> int:
    """Token rows whose logits exist at a time, by the rule of `raycomplete.losses.chunked_pass.rows_per_chunk`."""
    rows = (512 if is_gpu else 48) * 2**20 // (vocab_size * DTYPE_BYTES[dtype])
    return max(rows // 64 * 64, min(rows, 64), 1)


def worker_memory(request: Request, workers: int) -> dict[str, float]:
    """Bytes of one worker: states, frozen heads (whole on every worker), activations, the loss's buffers."""
    train, dtype, shapes, work = request.config.train, request.dtype, request.shapes, request.work
    student, size = shapes["student"], DTYPE_BYTES[dtype]
    trainable = float(student.lora_parameters(train.lora_rank)) if train.lora_rank else None
    parts = states_bytes(student.num_parameters + (trainable or 0.0), dtype, train.zero_stage, workers, trainable)
    if train.zero_stage == 3:  # one layer and, around the loss, the head are gathered
        parts["gathered"] = (student.head_parameters + student.body_parameters / student.num_layers) * size
    parts["frozen heads"] = (shapes["aligned"].head_parameters + shapes["base"].head_parameters) * float(size)
    of_worker = int(sum(item.count for item in work.trained)) // workers
    passes = workers * max(math.ceil(of_worker / train.per_device_batch_size), 1)
    tokens = sum(item.tokens for item in work.trained) / passes
    layer_bytes = student.activation_bytes_per_token(dtype)
    recomputed = student.num_layers * student.hidden_bytes_per_token(dtype) + layer_bytes
    parts["activations"] = tokens * (recomputed if train.gradient_checkpointing else student.num_layers * layer_bytes)
    rows, base_rows = work.loss_rows / passes, work.base_rows / passes
    chunk = min(chunk_rows(student.vocab_size, dtype, is_gpu=request.hardware.is_gpu), rows)
    hidden = rows * (2 * student.hidden_size + shapes["aligned"].hidden_size) + base_rows * shapes["base"].hidden_size
    parts["loss"] = ((2 * chunk + min(chunk, base_rows)) * student.vocab_size + hidden) * size
    if not train.lora_rank:  # the head's gradient: a sum in float32, and its copy for backward
        parts["head gradient"] = student.head_parameters * (4.0 + size)
    return parts if request.hardware.is_gpu else parts | {"process": WORKER_GIB * GIB}


def engine_memory(request: Request, role: str, replicas: int, parallel: int) -> dict[str, float]:
    """Bytes of one device of one of a role's engines; inference keeps the activations of one layer."""
    shape, size = request.shapes["student" if role == "rollout" else role], DTYPE_BYTES[request.dtype]
    batched, rollouts = request.config.teacher.max_num_batched_tokens, request.work.rollouts
    split = (shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate_size) / parallel
    activations = batched * (2 * shape.hidden_size + split) * size
    if role == "rollout" and rollouts is not None:
        running = min(rollouts.count / replicas, MAX_SEQUENCES)
        weights, cached = shape.num_parameters, running * (rollouts.prompt + rollouts.response)
        activations += running * shape.vocab_size * 4.0  # logits
    else:  # a pooling engine has no output head; on a CPU its cache is twice its batch
        weights = shape.body_parameters + shape.head_parameters
        cached = batched if request.hardware.is_gpu else 2 * batched
        activations += batched * shape.hidden_size * 4.0  # states, in float32
    parts = {
        "weights": weights * size / parallel,
        # A key-value head is never cut.
        "KV cache": cached * shape.kv_bytes_per_token(request.dtype) / min(parallel, shape.num_kv_heads),
        "activations": activations,
    }
    return parts if request.hardware.is_gpu else parts | {"process": ENGINE_GIB * GIB}


def memory_of(request: Request, layout: Layout) -> dict[str, dict[str, float]]:
    """Bytes of one device by role and by content."""
    found = {"training worker": worker_memory(request, layout.workers)}
    for role, count in layout.replicas.items():
        found[engine_name(role)] = engine_memory(request, role, count, layout.parallel[role])
    return found


# --- time ---


def train_s(request: Request, workers: int) -> float:
    """Seconds of forward, backward at twice its cost, perhaps forward again, and the products of the loss."""
    train, shapes, work = request.config.train, request.shapes, request.work
    student = shapes["student"]
    forwards = 4 if train.gradient_checkpointing else 3
    if train.lora_rank:  # frozen weights need no gradient: one of backward's two products
        forwards -= 1
    flops = work.passes * forwards * sum(item.flops(student) for item in work.trained)
    widths = work.loss_rows * ((2 if train.lora_rank else 3) * student.hidden_size + shapes["aligned"].hidden_size)
    widths += work.base_rows * shapes["base"].hidden_size
    flops += 2.0 * student.vocab_size * widths
    return flops / (workers * request.hardware.flops(request.dtype) * _TRAIN_SHARE)


def engine_s(request: Request, role: str, devices: int, parallel: int = 1) -> float:
    """Seconds of a role's work in one step on so many devices, of which each engine takes `parallel`."""
    shape, hardware, work = request.shapes["student" if role == "rollout" else role], request.hardware, request.work
    peak = devices * hardware.flops(request.dtype) * (_ENGINE_SHARE if hardware.is_gpu else 1.0)
    if role != "rollout" or work.rollouts is None:
        return sum(item.flops(shape) for item in work.scored[role]) / peak
    rollouts, size = work.rollouts, DTYPE_BYTES[request.dtype]
    written = rollouts.rows * (2.0 * shape.num_parameters)
    read = replace(rollouts, response=1).flops(shape)
    # Every decoding step reads the weights, and the keys of the sequences that it goes on with.
    rounds = max(rollouts.count / (devices / parallel * MAX_SEQUENCES), 1.0) * rollouts.response
    cached = rollouts.rows * (rollouts.prompt + rollouts.response / 2) * shape.kv_bytes_per_token(request.dtype)
    moved = rounds * shape.num_parameters * size / parallel + cached / devices
    return read / peak + max(written / peak, moved / (hardware.memory_bandwidth * _BANDWIDTH_SHARE))


def sync_bytes(request: Request) -> float:
    """Bytes of one update of the rollout engines' weights: adapters in float32, or all weights; 0 off-policy."""
    student, rank = request.shapes["student"], request.config.train.lora_rank
    if not request.config.rollout.on_policy:
        return 0.0
    return student.lora_parameters(rank) * 4.0 if rank else float(student.num_parameters) * DTYPE_BYTES[request.dtype]


def seconds_of(request: Request, layout: Layout) -> dict[str, float]:
    """Seconds of each role in one step, and of sending weights to engines on other nodes."""
    found = {"training workers": train_s(request, layout.workers)}
    for role, count in layout.replicas.items():
        devices = layout.devices if layout.shared else count * layout.parallel[role]
        found[f"{engine_name(role)}s"] = engine_s(request, role, devices, layout.parallel[role])
    if request.config.rollout.on_policy:
        sent = sync_bytes(request) * (request.nodes > 1) / (request.network_gbit * 1e9 / 8)
        found["updates of weights"] = sent / request.config.rollout.sync_every
    return found


def step_s(request: Request, layout: Layout) -> float:
    """Seconds of a step: all roles in turn on shared devices, else the slowest role; updates of weights come on top."""
    seconds = seconds_of(request, layout)
    sync = seconds.pop("updates of weights", 0.0)
    return sync + (sum(seconds.values()) if layout.shared else max(seconds.values()))


# --- devices ---


def choose_layout(request: Request) -> Layout:
    """The layout with the shortest step on the given devices; raises SetupError with a remedy where nothing fits."""
    parallel = {role: _smallest_parallel(request, role) for role in request.engines}
    for role, size in parallel.items():
        if not size:
            _refuse_engine(request, role)
    left = request.devices - sum(parallel.values())
    if left < 1:
        return _shared(request, sum(parallel.values()) + 1)
    counts = _worker_counts(request, left)
    fitting = [count for count in counts if _fits(request, worker_memory(request, count))]
    if not fitting:
        where = f"{request.shapes['student'].name} on each of {counts[-1]} worker(s)"
        problem = _too_large(request, "training worker", worker_memory(request, counts[-1]), where)
        raise SetupError(problem, _remedy(request, counts[-1]))
    layouts = [_filled(request, Layout(count, dict.fromkeys(parallel, 1), parallel)) for count in fitting]
    return min(layouts, key=lambda layout: (step_s(request, layout), layout.devices))


def _filled(request: Request, layout: Layout) -> Layout:
    """Gives the devices that are left to the slowest engines, as long as an engine is slower than the workers."""
    while True:
        sizes = layout.parallel
        seconds = {role: engine_s(request, role, n * sizes[role], sizes[role]) for role, n in layout.replicas.items()}
        slowest = max(seconds, key=lambda role: seconds[role])
        grown = replace(layout, replicas=layout.replicas | {slowest: layout.replicas[slowest] + 1})
        if grown.devices > request.devices or seconds[slowest] <= train_s(request, layout.workers):
            return layout
        layout = grown


def _smallest_parallel(request: Request, role: str) -> int:
    """The fewest devices that hold one engine of a role; 0 where no number of a node's devices does."""
    heads = request.shapes["student" if role == "rollout" else role].num_heads
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= request.devices_per_node and heads % size == 0]
    return next((size for size in sizes if _fits(request, engine_memory(request, role, 1, size))), 0)


def _refuse_engine(request: Request, role: str) -> NoReturn:
    """Refuses an engine that is too large, and names the fewest devices of a node with which everything fits."""
    shape, most = request.shapes["student" if role == "rollout" else role], request.devices_per_node
    parallel = max(size for size in (1, 2, 4, 8, 16) if size <= most and shape.num_heads % size == 0)
    where = f"{shape.name} over {parallel} device(s)"
    problem = _too_large(request, engine_name(role), engine_memory(request, role, 1, parallel), where)
    for size in range(most + 1, _LARGEST_NODE + 1):
        larger = replace(request, devices_per_node=size)
        if all(_smallest_parallel(larger, name) for name in request.engines):
            with suppress(SetupError):
                split = choose_layout(larger).parallel.items()
                words = ", ".join(f"{name} over {count}" for name, count in split if count > 1)
                remedy = f"The smallest change that fits: --gpus-per-node {size} (tensor parallel: {words})."
                break
    else:
        remedy = f"No node of up to {_LARGEST_NODE} such devices holds it: take larger devices or smaller models."
    raise SetupError(problem, remedy)


def _worker_counts(request: Request, most: int) -> list[int]:
    """Numbers of workers that both batches divide into."""
    both = math.gcd(request.config.method.anchor_batch_size, request.config.method.recovery_batch_size)
    return [count for count in range(1, most + 1) if both % count == 0]


def _fits(request: Request, parts: Mapping[str, float]) -> bool:
    return sum(parts.values()) <= request.usable_bytes


def _shared(request: Request, apart: int) -> Layout:
    """Every role on every device, or a refusal that names the number of devices on which each has its own."""
    workers = _worker_counts(request, request.devices)[-1]
    layout = Layout(workers, dict.fromkeys(request.engines, workers), dict.fromkeys(request.engines, 1), shared=True)
    totals = {role: sum(parts.values()) for role, parts in memory_of(request, layout).items()}
    if _fits(request, totals):
        return layout
    raise SetupError(
        _too_large(request, "run", totals, f"All roles on one {request.hardware.label}"),
        f"The smallest change that fits: {apart} devices, one or more for each role (--gpus-per-node {apart})."
        if _fits(request, worker_memory(request, 1))
        else _remedy(request, 1),
    )


def _remedy(request: Request, workers: int) -> str:
    """The first of a list of ever larger changes with which a worker fits."""
    train, method = request.config.train, request.config.method
    again: dict[str, Any] = {} if method.perturbs_layers else {"gradient_checkpointing": True}
    deepest = 2 if method.moves_suffixes or method.perturbs_layers else 3  # an adversary is refused under ZeRO-3
    stages, sizes = range(train.zero_stage, deepest + 1), (train.per_device_batch_size, 8, 4, 2, 1)
    steps: list[dict[str, Any]] = [] if train.gradient_checkpointing or not again else [again]
    steps += [{"zero_stage": stage} for stage in stages[1:]]
    steps += [again | {"zero_stage": stage, "per_device_batch_size": size} for stage in stages for size in sizes]
    changes = [(change, workers) for change in steps]
    least = again | {"zero_stage": deepest, "per_device_batch_size": 1}
    changes += [(least, count) for count in _worker_counts(request, 4096) if count > workers]
    changes += [(again | {"lora_rank": 64}, workers)] * (not train.lora_rank)
    for change, count in changes:
        config = request.config.model_copy(update={"train": train.model_copy(update=change)})
        if _fits(request, worker_memory(replace(request, config=config), count)):
            words = " ".join(f"train.{key}={str(value).lower()}" for key, value in change.items())
            devices = "" if count == workers else f"{count} training devices with "
            return f"The smallest change that fits: {devices}{words}."
    return "No ZeRO stage and no LoRA rank fits: take devices with more memory or a smaller student."


def _too_large(request: Request, role: str, parts: Mapping[str, float], where: str) -> str:
    room, total = request.usable_bytes, sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"The {role} does not fit: {where} needs {total / GIB:.1f} GiB a device, {(total - room) / GIB:.1f} GiB more "
        f"than the {room / GIB:.1f} GiB of a {request.hardware.label} that can be filled (largest part: {largest}, "
        f"{parts[largest] / GIB:.1f} GiB)."
    )


# --- the plan ---


@dataclass(frozen=True)
class Estimate:
    """A plan of a run; `memory` is of one device by role, `price` of one device and hour, `cost` of all steps."""

    request: Request
    layout: Layout
    memory: dict[str, dict[str, float]]
    seconds: dict[str, float]
    step_s: float
    price: float
    hours: float
    cost: float

    @property
    def bottleneck(self) -> str:
        """The role, or the updates of weights, that takes longest."""
        return "all roles in turn" if self.layout.shared else max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Processes, devices, tokens, seconds, tokens a second and share of a step by role."""
        layout, work = self.layout, self.request.work
        tokens = {role: sum(item.tokens for item in groups) for role, groups in work.scored.items()}
        tokens["rollout"] = work.rollouts.rows if work.rollouts is not None else 0.0
        found = {"training workers": (layout.workers, layout.workers, work.trained_tokens)}
        for role, count in layout.replicas.items():
            devices = layout.devices if layout.shared else count * layout.parallel[role]
            found[f"{engine_name(role)}s"] = (count, devices, tokens[role])
        return {
            name: {
                "processes": processes,
                "devices": devices,
                "tokens": read,
                "seconds": (seconds := self.seconds[name]),
                "tokens_per_s": read / seconds if seconds else 0.0,
                "busy": seconds / self.step_s,
            }
            for name, (processes, devices, read) in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and tokens."""
        request, layout, trained = self.request, self.layout, self.request.work.trained_tokens
        shapes = request.shapes.items()
        return {
            "hardware": asdict(request.hardware),
            "nodes": request.nodes,
            "devices_per_node": request.devices_per_node,
            "models": {role: asdict(shape) | {"parameters": shape.num_parameters} for role, shape in shapes},
            "layout": asdict(layout) | {"devices": layout.devices},
            "memory": {role: parts | {"total": sum(parts.values())} for role, parts in self.memory.items()},
            "memory_usable": request.usable_bytes,
            "rates": self.rates,
            "seconds": self.seconds,
            "sync_bytes": sync_bytes(request),
            "step_s": self.step_s,
            "bottleneck": self.bottleneck,
            "hours": self.hours,
            "price_per_device_hour": self.price,
            "cost": self.cost,
            "cost_per_million_trained_tokens": self.cost / (request.config.train.steps * trained) * 1e6,
            "trained_tokens_per_s": trained / self.step_s,
            "assumptions": self.assumptions(),
        }

    def assumptions(self) -> list[str]:
        """Every number of the plan that neither the run file nor the command line gave, in sentences."""
        request, device = self.request, self.request.hardware
        offer = "as given" if request.price is not None else "an example and no offer; give --price-per-gpu-hour"
        return [
            f"Hardware: {device.label}, {device.memory_bytes / GIB:.0f} GiB, {device.flops(request.dtype) / 1e12:.3g} "
            f"TFLOP/s in {request.dtype}, {device.memory_bandwidth / 1e9:,.4g} GB/s of memory. Products reach "
            f"{_ENGINE_SHARE if device.is_gpu else 1:.0%} of the peak in engines and {_TRAIN_SHARE:.0%} in training.",
            f"{RESERVED_SHARE:.0%} of each device stays free for context, fragmentation and communication buffers.",
            f"Prompts have {request.prompt_tokens:.0f} tokens on average (--prompt-tokens); responses are as long as "
            "the run file allows; depths average the middle of their range; no score is found in the cache.",
            "Not counted: communication within a step, host time, start of engines, sampling before training, "
            "evaluation, checkpoints and validation. Small models take longer, since launches of kernels do.",
            f"Price: {self.price:.2f} per device and hour, {offer}. All rented devices are paid for, used or not.",
            "All roles take turns on the same devices: their times add up."
            if self.layout.shared
            else "Each role has devices of its own and works ahead of the others: the slowest sets the pace.",
        ]


def make_plan(request: Request) -> Estimate:
    """Plans a run; raises SetupError where it does not fit."""
    layout = choose_layout(request)
    price = request.hardware.example_price if request.price is None else request.price
    step = step_s(request, layout)
    hours = request.config.train.steps * step / 3600
    memory, seconds = memory_of(request, layout), seconds_of(request, layout)
    return Estimate(request, layout, memory, seconds, step, price, hours, hours * request.devices * price)
