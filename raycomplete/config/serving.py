"""Settings of the evaluation service: where it listens, who may ask what of it, and how it scales."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from raycomplete.runtime.section import Section
from raycomplete.runtime.types import ModelRole


class ServeConfig(Section):
    """`raycomplete serve`. Relative paths start where the server is started, as those of `models` do."""

    host: str = Field("127.0.0.1", description="address to listen on; any but 127.0.0.1 demands a token")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    state: Path = Field(
        Path("runs/serve-state"), description="folder of the queue and all results; it survives a restart"
    )
    token_file: Path | None = Field(None, description="file with the bearer token; RAYCOMPLETE_TOKEN goes before it")
    model_roots: list[Path] = Field(default_factory=list, description="checkpoints below these folders are allowed")
    models: list[str] = Field(
        default_factory=list, description="further checkpoints that are allowed, such as hub:ORG/NAME"
    )
    data_roots: list[Path] = Field(default_factory=list, description="files below these folders may be read by attacks")
    max_queued: int = Field(1000, ge=1, description="evaluations that may wait; more are answered with 429")
    runners: int = Field(1, ge=1, description="evaluations that run side by side, each with its own engines")
    replicas: tuple[int, int] = Field((1, 2), description="processes that answer HTTP, at least and at most")
    show_harmful: bool = Field(False, description="let clients read harmful completions that they ask for")
    chat: bool = Field(False, description="answer prompts in OpenAI's shape (/v1/chat/completions, /v1/completions)")
    chat_models: list[ModelRole] | None = Field(
        None, min_length=1, description="models that answer, each with an engine of its own; absent: all that there are"
    )

    @field_validator("replicas")
    @classmethod
    def _in_order(cls, replicas: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= replicas[0] <= replicas[1]:
            raise ValueError("needs two numbers, at least 1 and in order")
        return replicas
