"""Settings of the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raycomplete.runtime.section import Section


class ValidationConfig(Section):
    """Early stopping on training prompts that are held back from training."""

    every: int = Field(0, ge=0, description="steps between two measurements; 0 is off")
    num_prompts: int = Field(32, ge=1, description="prompts of each kind that are held back")
    patience: int = Field(3, ge=1, description="measurements without a better one before training stops")


class TrainConfig(Section):
    """Ray Train and DeepSpeed, whatever the method trains."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    lr: float = Field(5e-5, gt=0, description="learning rate after warm-up; it falls to a tenth along a cosine")
    warmup_steps: int = Field(5, ge=0, description="steps over which the learning rate rises to lr")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    seed: int = Field(0, ge=0, description="seed of samples, their order, depths and rollouts")
    num_workers: int = Field(1, ge=1, description="data-parallel training workers")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="ZeRO stage: 1 shards optimizer states over the workers, 2 gradients too, 3 weights too"
    )
    per_device_batch_size: int = Field(16, ge=1, description="sequences of one forward pass on one worker")
    loss_chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="token rows whose logits exist at a time; auto: as many as a fixed budget of memory holds"
    )
    loss_backend: Literal["auto", "torch", "triton"] = Field("auto", description="auto: Triton on CUDA, else PyTorch")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    lora_rank: int = Field(0, ge=0, description="rank of LoRA adapters, merged at the end; 0 trains all weights")
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    sinks: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="places of metrics beside metrics.jsonl"
    )
    checkpoint_every: int = Field(25, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay, here and in output.storage")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of so many steps stay for good; 0 is off")
    checkpoint_hashes: bool = Field(
        True, description="compare the sha256 of every checkpoint file on resume; false compares sizes only"
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="times that training goes on from its newest checkpoint after the death of a worker or a node",
    )
    max_bad_steps: int = Field(3, ge=1, description="skipped steps in a row, for NaN or infinity, that end training")
    stall_timeout_s: float = Field(1800.0, gt=0, description="longest time without a finished step")
