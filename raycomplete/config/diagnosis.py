"""Settings of `raycomplete diagnose`: which prompts it reads and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from raycomplete.runtime.section import Section

HUB = "hub:"


class PromptColumns(Section):
    """A file of prompts, and which of its rows and columns they are."""

    prompt: str = Field("prompt", description="column of the user message")
    messages: str = Field(
        "messages",
        description="column of a conversation, [{role, content}, ...], read in rows without a value in `prompt`; its "
        "last user message is the prompt",
    )
    context: str | None = Field(None, description="column appended to the user message where it is not empty")
    answer: str | None = Field(None, description="column of the answer")
    where: dict[str, str | bool | int] = Field(default_factory=dict, description="keep rows with these values only")
    max_characters: int | None = Field(
        None, ge=1, description="leave out rows whose prompt, as one text with its context and conversation, is longer"
    )
    limit: int | None = Field(None, ge=1, description="keep at most this many rows, drawn under data.seed")


class PromptSource(PromptColumns):
    """Prompts and which of their columns to read: a file, several, a folder, or a data set of the hub."""

    path: str = Field(
        description="a file or a pattern of files (JSONL, JSON, CSV, Parquet), the folder of a data set, or "
        "`hub:ORG/NAME`; files and folders relative to the run file"
    )
    config: str | None = Field(None, description="configuration of a data set that has several")
    split: str = Field("train", description="split of a data set, or rows of it: train[:100]; files have none")
    revision: str | None = Field(None, description="branch, tag or commit on the hub; the newest when absent")
    held_back: bool = Field(
        False, description="never train on these rows; measure the student on them during training (data.train only)"
    )

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @property
    def hub_id(self) -> str | None:
        """The name on the hub; None for what lies on this machine."""
        return self.path.removeprefix(HUB) if self.path.startswith(HUB) else None


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
