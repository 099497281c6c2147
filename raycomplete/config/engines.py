"""Settings of the vLLM engines: scoring by the frozen models, rollouts, and what each role asks of the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from raycomplete.runtime.section import Section

ANSWER_TIMEOUT_S = 1800.0
"""Longest wait for one call to a rollout engine."""
SYNC_TIMEOUT_S = 300.0
"""Longest wait for one update of the engines' weights."""
OVERSAMPLE = 2
"""Rollouts of each trained recovery sequence: those that still comply are trained first."""


class TeacherConfig(Section):
    """The vLLM pooling engines that read hidden states of the frozen models."""

    prefetch: ClassVar[int] = 2  # steps scored ahead of the trainer
    parity_prompts: ClassVar[int] = 4  # sequences that the start compares with transformers

    replicas: int = Field(1, ge=1, description="engines of each frozen model; they share every batch by tokens")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one node that hold one frozen model together")
    gpu_memory_utilization: float = Field(0.25, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    max_num_batched_tokens: int = Field(8192, ge=64, description="tokens that one engine reads at a time")


class PromptAugmentationConfig(Section):
    """Prompts that the student reads with a suffix, in a template or in other words, and the teachers as they are."""

    fraction: float = Field(0.0, ge=0, le=1, description="share of the samples")
    recovery_fraction: float | None = Field(
        None, ge=0, le=1, description="share of the recovery samples, where an adversary needs more; null: the same"
    )
    random_suffix_tokens: int = Field(16, ge=0, description="longest suffix of random tokens; 0: no such suffixes")
    suffixes: Path | None = Field(None, description="JSONL with suffix, such as suffixes that GCG found")
    templates: Path | None = Field(None, description="JSONL with template, where {prompt} stands for the prompt")
    paraphrases: Path | None = Field(None, description="JSONL with prompt and paraphrases, a list of texts")

    def share_of(self, part: str) -> float:
        """Returns the share of the samples of a part (`anchor`, `recovery`) that are changed."""
        own = self.recovery_fraction if part == "recovery" else None
        return self.fraction if own is None else own

    @model_validator(mode="after")
    def _something_to_draw(self) -> PromptAugmentationConfig:
        if self.recovery_fraction and not self.fraction:
            raise ValueError(
                "rollout.prompt_augmentation.recovery_fraction without fraction would teach that changed prompts are "
                "harmful: set fraction, to 0.3 for instance"
            )
        if self.fraction > 0 and not (self.random_suffix_tokens or self.suffixes or self.templates or self.paraphrases):
            raise ValueError(
                "rollout.prompt_augmentation.fraction needs something to draw from: set random_suffix_tokens, or name "
                "a file of suffixes, templates or paraphrases"
            )
        return self


class RolloutConfig(Section):
    """Settings for sampling anchor answers, refusals and harmful continuations."""

    gpu_memory_utilization: float = Field(0.25, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    temperature: float = Field(1.0, ge=0, description="sampling temperature of anchor answers and continuations")
    max_anchor_tokens: int = Field(64, ge=4, description="length of the aligned model's own answers")
    max_refusal_tokens: int = Field(32, ge=4, description="length of the refusals that recovery teaches")
    max_harmful_tokens: int = Field(96, ge=4, description="length of harmful continuations")
    affirmative_prefixes: list[str] = Field(
        default_factory=lambda: ["Sure, here is", "", "Step 1:"],
        min_length=1,
        description='openings under which harmful continuations are sampled, "" for none; diagnosis takes the first',
    )
    harmful_from: list[str] = Field(
        default_factory=lambda: ["base"],
        min_length=1,
        description="who writes harmful continuations: base, aligned, student, or another checkpoint of their "
        "architecture, named as in models",
    )
    harmful_per_prompt: int = Field(
        2, ge=1, description="harmful continuations of each prompt, each of a drawn writer and opening"
    )
    mid_answer_fraction: float = Field(
        0.25, ge=0, le=1, description="share of harmful continuations that start in the middle of an answer"
    )
    prompt_augmentation: PromptAugmentationConfig = Field(default_factory=PromptAugmentationConfig)
    refusal_prefix_fraction: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of recovery samples whose harmful continuation follows an imitated refusal and a turn",
    )
    refusal_prefix_turns: list[str] = Field(
        default_factory=lambda: ["However,", "Anyway,", "Still,", "On second thought,", "That said,"],
        min_length=1,
        description="words that turn from the imitated refusal to the answer",
    )
    safety_prompt: str | None = Field(None, description="system prompt that only the teacher sees, where it answers")
    on_policy: bool = Field(False, description="let the student roll out in every step, under its current weights")
    num_engines: int = Field(1, ge=1, description="engines that share the rollouts")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one node that hold one rollout engine together")
    max_student_tokens: int = Field(32, ge=1, description="tokens that the student adds to a prefill")
    sync_every: int = Field(1, ge=1, description="steps between two updates of the engines' weights")
    colocated: bool = Field(False, description="GPU: let engines sleep while the trainer works on the same device")

    @property
    def harmful_openings(self) -> list[tuple[str, str]]:
        """Pairs (writer, opening); aligned and student are paired only with a non-empty opening."""
        return [
            (writer, opening)
            for writer in dict.fromkeys(self.harmful_from)
            for opening in dict.fromkeys(self.affirmative_prefixes)
            if opening or writer not in ("aligned", "student")
        ]

    def ahead(self, *, fresh: bool) -> int:
        """Batches rolled out ahead of the trainer: none where they must be fresh, or both share a device in turns."""
        return 0 if fresh or self.colocated else 1

    @field_validator("harmful_from", mode="before")
    @classmethod
    def _one_writer(cls, writers: Any) -> Any:
        return [writers] if isinstance(writers, str) else writers

    @model_validator(mode="after")
    def _every_writer_writes(self) -> RolloutConfig:
        if {writer for writer, _ in self.harmful_openings} != set(self.harmful_from):
            raise ValueError(
                "rollout.harmful_from names aligned or student, who refuse unless something opens their answer: give "
                "rollout.affirmative_prefixes an opening that is not empty"
            )
        return self

    @model_validator(mode="after")
    def _sleeps_on_one_device(self) -> RolloutConfig:
        if self.colocated and self.tensor_parallel > 1:
            raise ValueError("rollout.colocated engines sleep on one device: set rollout.tensor_parallel to 1")
        return self


class ClusterConfig(Section):
    """The Ray cluster, and what each role asks of it. GPUs are used where `use_gpu` finds them."""

    cpus_per_engine: ClassVar[float] = 0.5  # logical CPUs, so that a laptop holds a whole run
    cpus_per_worker: ClassVar[float] = 0.5
    kv_cache_gib: ClassVar[int] = 1  # CPU only; a scorer takes less where it reads less at a time

    address: str | None = Field(
        None, description="Ray address; absent: the current job's cluster, else one is started here"
    )
    use_gpu: Literal["auto", "never", "always"] = Field("auto", description="auto: where the cluster has one")
    gpus_per_engine: float = Field(0.2, ge=0, description="GPUs that an engine reserves, where GPUs are used")
    gpus_per_worker: float = Field(0.4, ge=0, description="GPUs that a training worker reserves, where GPUs are used")
    placement: Literal["pack", "spread", "strict_spread"] = Field(
        "pack", description="engines close together, apart where possible, or each on a node of its own"
    )
    worker_placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack", description="the same for training workers, which Ray Train places"
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="longest wait for nodes that join, and for actors to be placed and ready; absent: 10 s for nodes, "
        "600 s for actors",
    )

    @property
    def nodes_timeout_s(self) -> float:
        """Longest wait for nodes that are still joining."""
        return self.timeout_s or 10.0

    @property
    def start_timeout_s(self) -> float:
        """Longest wait for actors to be placed and ready."""
        return self.timeout_s or 600.0
