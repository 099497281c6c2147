"""The request for a plan: models, hardware and one optimizer step's work, and the devices that each role gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raycomplete.config import Dtype, RunConfig, TrainConfig
from raycomplete.methods.completion import Completion
from raycomplete.plan.catalogue import Hardware, ModelShape
from raycomplete.runtime.errors import ConfigError

FROZEN = ("aligned", "base")
RESERVED_SHARE = 0.08


@dataclass(frozen=True)
class Sequences:
    """Some number of sequences with `prompt` tokens before `response` tokens."""

    count: float
    prompt: float
    response: float

    @property
    def length(self) -> float:
        """Tokens that a model reads of one: the last one predicts nothing that is asked for."""
        return self.prompt + self.response - 1

    @property
    def tokens(self) -> float:
        """Tokens that a model reads of all."""
        return self.count * self.length

    @property
    def rows(self) -> float:
        """Response tokens of all: a row of hidden states each."""
        return self.count * self.response


@dataclass(frozen=True)
class Workload:
    """One optimizer step over all workers.

    Attributes:
        trained: Sequences that the student reads.
        scored: Sequences that each frozen model reads, by role.
        rollouts: Sequences that the student samples: prompt with prefill, and new tokens; None off-policy.
        loss_rows: Rows of the loss, of which `base_rows` need base.
        micro_batches: Forward passes of one worker.
        passes: Forward and backward passes over each of them; 1 but for methods that read a batch again, or parts.
        launches: Times that each layer is started for them, forward and backward.
    """

    trained: tuple[Sequences, ...]
    scored: dict[str, tuple[Sequences, ...]]
    rollouts: Sequences | None
    loss_rows: float
    base_rows: float
    micro_batches: int
    passes: float = 1.0
    launches: float = 1.0

    @property
    def trained_tokens(self) -> float:
        """Tokens of the trained sequences, as metrics.jsonl counts them."""
        return sum(item.count * (item.prompt + item.response) for item in self.trained)

    @classmethod
    def of_run(cls, config: RunConfig, prompt_tokens: float, num_workers: int) -> Workload:
        """The expected step of a run file, with responses at their longest and depths at the middle of their range."""
        train, rollout, method = config.train, config.rollout, config.method
        contrastive = isinstance(method, Completion) and method.contrastive.alpha > 0
        pushes = is_penalised = opens = False
        again = launches = method.extra_passes
        if isinstance(method, Completion):
            pushes, is_penalised = method.weights.push_forward > 0, method.weights.penalty > 0
            opens = method.weights.opening > 0
        depth = (method.depth.min + min(method.depth.max, rollout.max_harmful_tokens)) / 2
        anchor = Sequences(method.anchor_batch_size, prompt_tokens, rollout.max_anchor_tokens)
        refusal = Sequences(method.recovery_batch_size, prompt_tokens, rollout.max_refusal_tokens)
        harmful = Sequences(method.recovery_batch_size, prompt_tokens, rollout.max_harmful_tokens)
        read = method.recovery_batch_size * method.recovery_sequences
        student = Sequences(read, prompt_tokens, depth + rollout.max_refusal_tokens)
        if isinstance(method, Completion) and (steps := method.suffix_adversary.steps):
            # Its adversary reads samples with a suffix up to the h that it wants, without gradients of weights: 2/3.
            share = rollout.prompt_augmentation.share_of("recovery") * (1 - rollout.refusal_prefix_fraction)
            share *= 1 - rollout.mid_answer_fraction
            read_again = Sequences(share * read, prompt_tokens, min(depth, method.suffix_adversary.target_tokens))
            again += steps * 2 / 3 * read_again.tokens / (anchor.tokens + student.tokens)
            launches += steps
        sampled = method.recovery_batch_size * rollout.oversample
        drawn = Sequences(sampled, prompt_tokens + depth, rollout.max_student_tokens)
        answers = anchor.rows + refusal.rows
        rows_along_h = method.recovery_batch_size * depth
        rows = answers + (pushes + is_penalised) * rows_along_h + opens * method.recovery_batch_size
        per_worker = (method.anchor_batch_size + read) // num_workers
        return cls(
            trained=(anchor, student),
            scored={
                "aligned": (anchor, refusal),
                "base": (*((harmful,) if is_penalised else ()), *((anchor, refusal) if contrastive else ())),
            },
            rollouts=drawn if rollout.on_policy else None,
            loss_rows=rows,
            base_rows=contrastive * answers + is_penalised * rows_along_h,
            micro_batches=-(-per_worker // min(train.per_device_batch_size, max(per_worker, 1))) if per_worker else 1,
            passes=1.0 + again,
            launches=1.0 + launches,
        )


@dataclass(frozen=True)
class Request:
    """Models (student, aligned and base), hardware and run file of a plan.

    Attributes:
        devices_per_node: GPUs of one machine, or 1 on a CPU machine.
        price: Price of one device and hour; None takes the hardware's example.
        prompt_tokens: Mean tokens of a prompt with its chat template.
        network_gbit: Gigabits a second of one node in Ray's object store (TCP).

    Raises:
        ConfigError: A number is not positive.
    """

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
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second of one node."""
        return self.network_gbit * 1e9 / 8

    @property
    def train(self) -> TrainConfig:
        """The run file's trainer."""
        return self.config.train

    @property
    def dtype(self) -> Dtype:
        """Type of all weights; `auto` is the faster one on this hardware."""
        asked, hardware = self.config.models.dtype, self.hardware
        if asked != "auto":
            return asked
        return "bfloat16" if hardware.bfloat16_flops > hardware.float32_flops else "float32"

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device that a plan may fill: the rest is for CUDA, fragmentation and communication buffers."""
        return self.hardware.memory_bytes * (1 - RESERVED_SHARE)

    @property
    def engines(self) -> tuple[str, ...]:
        """Roles on engines: "aligned", "base" and, on-policy, "rollout"; measurements read what no step does."""
        return (*FROZEN, *(["rollout"] if self.config.rollout.on_policy else []))

    def workload(self, workers: int) -> Workload:
        """One optimizer step."""
        return Workload.of_run(self.config, self.prompt_tokens, workers)

    def with_train(self, **changes: object) -> Request:
        """The same request with other settings of the trainer."""
        train = self.config.train.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"train": train}))


@dataclass(frozen=True)
class Layout:
    """The devices that each role gets.

    Attributes:
        workers: Data-parallel training workers, one device each.
        replicas: Engines by role.
        parallel: Devices of one engine by role (tensor parallel).
        shared: Every device holds a worker and an engine of each role, which take turns.
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

    def with_engines(self, role: str, more: int = 1) -> Layout:
        """The same layout with some engines of a role more."""
        return replace(self, replicas={**self.replicas, role: self.replicas[role] + more})
