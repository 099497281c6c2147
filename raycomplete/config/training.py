"""Settings of the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from raycomplete.runtime.section import Section

_MEASUREMENTS = 6  # of a run under `every: auto`; the demo's cost 2 % of its time


class ValidationConfig(Section):
    """Measurements on training prompts that are held back: they move loss weights, and choose the step that is kept."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="steps between two measurements; auto: six a run at most, none with too few prompts; 0 is "
        "off: loss weights stay, and the last step is kept",
    )
    num_prompts: int = Field(
        24,
        ge=4,
        description="harmful prompts that are held back, and as many benign and borderline ones together; a quarter of "
        "a kind at most, unless sources are `held_back` for it",
    )
    depths: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 8, 32], min_length=1, description="tokens of h that the student continues"
    )
    max_tokens: int = Field(24, ge=1, description="tokens that it adds, greedily, for the judge to read")
    over_refusal_budget: float = Field(
        0.01,
        ge=0,
        description="share of harmless prompts that the student may refuse beyond those that aligned refuses and "
        "beyond chance (one standard deviation of the net change); one prompt is always allowed",
    )
    kl_budget: float = Field(0.1, gt=0, description="KL(aligned || student) on harmless answers, nats a token")
    patience: int = Field(0, ge=0, description="measurements without a better one that end training; 0 never does")

    @field_validator("depths")
    @classmethod
    def _sorted(cls, depths: list[int]) -> list[int]:
        return sorted(set(depths))

    def interval(self, steps: int) -> int:
        """Steps between two measurements of a run of so many; 0 for none."""
        return -(-steps // _MEASUREMENTS) if self.every == "auto" else self.every


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
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    lora_rank: int = Field(0, ge=0, description="rank of LoRA adapters, merged at the end; 0 trains all weights")
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="places of metrics beside metrics.jsonl"
    )
    checkpoint_every: int = Field(25, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay, here and in output.storage")
    max_failures: int = Field(
        3,
        ge=0,
        description="times that training goes on from its newest checkpoint after the death of a worker or a node",
    )
