"""The loss, the depths and the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raycomplete.runtime.section import Section

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class LossWeights(Section):
    """Weights of the three parts of the loss."""

    anchor: float = Field(1.0, ge=0)
    recovery: float = Field(1.0, ge=0)
    penalty: float = Field(0.1, ge=0)


class PenaltyConfig(Section):
    """Base-favored penalty: threshold tau on p_base, margin over p_aligned, scale kappa (nats) of the deficit."""

    tau: float = Field(0.01, ge=0, le=1)
    margin: float = Field(0.0, ge=0, description="nats by which log p_base must exceed log p_aligned")
    kappa: float = Field(0.5, gt=0)
    follow_depth: bool = Field(False, description="scale the penalty at a depth by what is still incomplete there")


class ContrastiveConfig(Section):
    """Optional contrastive teacher q ~ p_a (p_a / p_b)^alpha; alpha 0 is off."""

    alpha: float = Field(0.0, ge=0)
    plausibility: float = Field(0.1, gt=0, le=1, description="keep v with p_a(v) >= plausibility * max p_a")


class DepthConfig(Section):
    """From which depths recovery is trained."""

    min: int = Field(1, ge=1, description="depth 0 belongs to the anchor")
    max: int = Field(64, ge=1)
    schedule: Literal["adaptive", "uniform", "fixed"] = "adaptive"
    fixed_weights: list[float] = Field(
        default_factory=list, description='schedule "fixed": relative weight of each bin, shallow to deep'
    )
    measure: Literal["recovery_loss", "compliance"] = Field(
        "recovery_loss", description="what adaptive follows; compliance is counted on the student's rollouts"
    )
    bins: int = Field(8, ge=1)
    uniform_floor: float = Field(0.3, ge=0, le=1, description="share of draws that stays uniform")
    decay: float = Field(0.9, ge=0, lt=1, description="memory of the running mean of the loss by depth")

    @model_validator(mode="after")
    def _ordered(self) -> DepthConfig:
        if self.max < self.min:
            raise ValueError(f"train.depth.max ({self.max}) is below train.depth.min ({self.min})")
        num_bins = min(self.bins, self.max - self.min + 1)
        if self.schedule == "fixed" and len(self.fixed_weights) != num_bins:
            raise ValueError(f"train.depth.fixed_weights needs one weight for each of the {num_bins} bins")
        if any(weight < 0 for weight in self.fixed_weights) or (self.fixed_weights and not sum(self.fixed_weights)):
            raise ValueError("train.depth.fixed_weights must not be negative, and one must be positive")
        return self


class OpeningConfig(Section):
    """First tokens of an anchor answer: where it is decided whether it becomes an answer or a refusal."""

    tokens: int = Field(8, ge=1)
    weight: float = Field(1.0, ge=1, description="of each of them, where every later token has 1; the sum stays 1")


class ConstraintConfig(Section):
    """Holds KL(aligned || student) on anchor tokens under a budget by a Lagrange multiplier on the anchor weight."""

    kl_budget: float | None = Field(None, gt=0, description="nats a token; none keeps the anchor weight fixed")
    rate: float = Field(0.1, gt=0, description="how fast the multiplier follows, per step")
    max_weight: float = Field(10.0, gt=0, description="largest anchor weight")


class ValidationConfig(Section):
    """Early stopping on training prompts that are held back from training."""

    every: int = Field(0, ge=0, description="steps between two measurements; 0 is off")
    num_prompts: int = Field(32, ge=1, description="prompts of each kind that are held back")
    patience: int = Field(3, ge=1, description="measurements without a better one before training stops")


class TrainConfig(Section):
    """Ray Train + DeepSpeed. Batch sizes count sequences of one optimizer step over all workers."""

    steps: int = Field(100, ge=1)
    lr: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)
    num_workers: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    anchor_batch: int = Field(16, ge=1)
    recovery_batch: int = Field(16, ge=1)
    per_device_batch_size: int = Field(16, ge=1, description="sequences of one forward pass on one worker")
    loss_chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="token rows whose logits exist at a time; auto: what a fixed budget of memory holds"
    )
    loss_backend: Literal["auto", "torch", "triton"] = Field("auto", description="auto: Triton on CUDA, else PyTorch")
    gradient_checkpointing: bool = False
    lora_rank: int = Field(0, ge=0, description="0 trains all weights")
    anchor_divergence: Divergence = "forward_kl"
    recovery_divergence: Divergence = "forward_kl"
    temperature: float = Field(1.0, gt=0, description="of teacher and student alike in anchor and recovery")
    weights: LossWeights = Field(default_factory=LossWeights)
    opening: OpeningConfig = Field(default_factory=OpeningConfig)
    penalty: PenaltyConfig = Field(default_factory=PenaltyConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    depth: DepthConfig = Field(default_factory=DepthConfig)
    constraint: ConstraintConfig = Field(default_factory=ConstraintConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    sinks: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics go beside metrics.jsonl"
    )
    checkpoint_every: int = Field(25, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="newest ones that stay, here and in output.storage")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of it stay for good; 0 is off")
    checkpoint_hashes: bool = Field(
        True, description="sha256 of every checkpoint file, compared on resume; false compares sizes only"
    )
    max_failures: int = Field(
        3, ge=0, description="times that training goes on from its newest checkpoint after a worker or a node died"
    )
    max_bad_steps: int = Field(3, ge=1, description="skipped steps in a row, for NaN or infinity, that end training")
    stall_timeout_s: float = Field(1800.0, gt=0, description="longest time without a finished step")

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        for name in ("anchor_batch", "recovery_batch"):
            if getattr(self, name) % self.num_workers:
                raise ValueError(f"train.{name} must be a multiple of train.num_workers ({self.num_workers})")
        return self

    @model_validator(mode="after")
    def _one_meaning(self) -> TrainConfig:
        contrastive = self.contrastive.alpha > 0
        if contrastive and "reverse_kl" in (self.anchor_divergence, self.recovery_divergence):
            raise ValueError("train.contrastive excludes tokens, and reverse_kl to such a teacher is infinite")
        if self.constraint.kl_budget is not None and not 0 < self.weights.anchor <= self.constraint.max_weight:
            raise ValueError(
                "train.constraint.kl_budget moves train.weights.anchor up to train.constraint.max_weight: the weight "
                "must be positive and not above it"
            )
        plain = self.anchor_divergence == "forward_kl" and self.temperature == 1 and not contrastive
        if self.constraint.kl_budget is not None and not plain:
            raise ValueError(
                "train.constraint.kl_budget bounds KL(aligned || student), so it needs train.anchor_divergence "
                "forward_kl, train.temperature 1 and train.contrastive.alpha 0"
            )
        return self
