"""What a run reads: checkpoints and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raycomplete.runtime.section import Dtype, Section


class ModelsConfig(Section):
    """Where the checkpoints are: a folder, a hub id, a .gguf file, `organism:base`, or `package:NAME` (its GGUF)."""

    base: str
    aligned: str
    student: str | None = Field(None, description="start of the student; the aligned model when absent")
    dtype: Dtype = "bfloat16"
    max_length: int = Field(1024, ge=16, description="longest sequence (prompt + response) in tokens")
    trust_remote_code: bool = False


class PromptSource(Section):
    """One file of prompts (JSONL, JSON, CSV or Parquet) and which of its columns to read."""

    path: Path
    prompt: str = Field("prompt", description="column of the user message")
    context: str | None = Field(None, description="column appended to the user message where it is not empty")
    answer: str | None = Field(None, description="column of the answer")
    where: dict[str, str | bool | int] = Field(default_factory=dict, description="keep rows with these values")
    limit: int | None = Field(None, ge=1, description="keep at most this many rows, drawn under data.seed")


class PromptSets(Section):
    """Prompt files by what they are for."""

    harmful: list[PromptSource] = Field(default_factory=list)
    benign: list[PromptSource] = Field(default_factory=list)
    borderline: list[PromptSource] = Field(default_factory=list)


class DataConfig(Section):
    """Training and held-out prompts: the embedded organism, or files."""

    source: Literal["organism", "files"] = "files"
    seed: int = 0
    train: PromptSets = Field(default_factory=PromptSets)
    evaluation: PromptSets = Field(default_factory=PromptSets)
    limit_per_kind: int | None = Field(None, ge=1, description="organism: prompts of each kind for training")


class AlignConfig(Section):
    """`raycomplete align`: safety SFT that makes an aligned twin of a base model."""

    refusals: list[PromptSource] = Field(default_factory=list, description="prompts with safe answers")
    benign: list[PromptSource] = Field(default_factory=list, description="harmless prompts; base answers them itself")
    output: Path | None = Field(None, description="where the aligned checkpoint is written")
    steps: int = Field(100, ge=1)
    lr: float = Field(2e-5, gt=0)
    batch_size: int = Field(16, ge=1)
    benign_fraction: float = Field(0.5, ge=0, le=1)
    max_answer_tokens: int = Field(96, ge=1)
    lora_rank: int = Field(0, ge=0, description="0 trains all weights")
