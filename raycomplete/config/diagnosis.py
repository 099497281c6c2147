"""Settings of `raycomplete diagnose`: which prompts it reads and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from raycomplete.runtime.section import Section

HUB = "hub:"


class PromptSource(Section):
    """Prompts and which of their columns to read: a file, several, a folder, or a data set of the hub."""

    path: str = Field(
        description="a file or a pattern of files (JSONL, JSON, CSV, Parquet), the folder of a data set, or "
        "`hub:ORG/NAME`, at a branch, tag or commit `hub:ORG/NAME@REVISION`; files and folders relative to the run file"
    )
    config: str | None = Field(None, description="configuration of a data set that has several")
    split: str = Field("train", description="split of a data set, or rows of it: train[:100]; files have none")
    prompt: str | list[str] = Field(
        "prompt", description="column of the user message; of several, those that are not empty are appended"
    )
    messages: str = Field(
        "messages",
        description="column of a conversation, [{role, content}, ...], read in rows without a value in `prompt`; its "
        "last user message is the prompt",
    )
    answer: str | None = Field(None, description="column of the answer")
    where: dict[str, str | bool | int] = Field(default_factory=dict, description="keep rows with these values only")
    limit: int | None = Field(None, ge=1, description="keep at most this many rows, drawn under data.seed")
    held_back: bool = Field(
        False, description="never train on these rows; measure the student on them during training (data.train only)"
    )

    @field_validator("prompt")
    @classmethod
    def _has_a_column(cls, prompt: str | list[str]) -> str | list[str]:
        if not prompt:
            raise ValueError("prompt names no column")
        return prompt

    @property
    def prompt_columns(self) -> list[str]:
        """The column of the user message, and those that are appended to it."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @property
    def hub_id(self) -> str | None:
        """The name on the hub, without its revision; None for what lies on this machine."""
        return self.path.removeprefix(HUB).partition("@")[0] if self.path.startswith(HUB) else None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the hub; None for the newest."""
        return self.path.partition("@")[2] or None if self.path.startswith(HUB) else None


class DiagnoseConfig(Section):
    """Measures where alignment stopped, by position. It needs base and aligned only; a student is shown beside them."""

    student: str | None = Field(None, description="checkpoint; the student of the run of this name when absent")
    harmful: list[PromptSource] = Field(default_factory=list, description="data.evaluation.harmful when empty")
    benign: list[PromptSource] = Field(default_factory=list, description="data.evaluation.benign when empty")
    num_prompts: int | None = Field(128, ge=2, description="prompts of each kind, the first ones; null takes all")
    answers: Literal["given", "extended", "sampled"] = Field(
        "extended",
        description="given: the answer column as it is, sampled from base where it is empty; extended: the same, and "
        "base writes on greedily to max_tokens; sampled: base's own rollouts, whatever the column holds",
    )
    max_tokens: int = Field(128, ge=1, description="response tokens that are measured")
    gradient: Literal["off", "head"] = Field("head", description="gradient of safety losses by position")
    show_harmful: bool = Field(False, description="show the context of base-favored tokens unmasked")
