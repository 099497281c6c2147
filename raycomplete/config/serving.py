"""Settings of the evaluation service: where it listens, who may ask what of it, and how it scales."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raycomplete.runtime.section import Section
from raycomplete.runtime.types import ModelRole


class AutoscalingConfig(Section):
    """Replicas that answer HTTP. A stream of events counts as one ongoing request for as long as it is open."""

    min_replicas: int = Field(1, ge=1, description="replicas at least")
    max_replicas: int = Field(2, ge=1, description="replicas at most")
    target_ongoing_requests: float = Field(
        64.0, gt=0, description="requests and streams of one replica that scaling aims at"
    )
    max_ongoing_requests: int = Field(512, ge=1, description="requests and streams of one replica at most")
    upscale_delay_s: float = Field(10.0, ge=0, description="how long load must last before a replica is added")
    downscale_delay_s: float = Field(300.0, ge=0, description="how long load must be low before one is removed")

    @model_validator(mode="after")
    def _in_order(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("serve.autoscaling.max_replicas is below serve.autoscaling.min_replicas")
        return self


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
    max_body_kib: int = Field(64, ge=1, description="largest request; larger ones are answered with 413")
    max_prompts: int = Field(1000, ge=1, description="held-out prompts of each kind that a request may ask for")
    runners: int = Field(1, ge=1, description="evaluations that run side by side, each with its own engines")
    max_attempts: int = Field(3, ge=1, description="starts of one evaluation before it counts as failed")
    lease_s: float = Field(30.0, gt=0, description="seconds of silence of a runner after which another one takes over")
    retry_after_s: int = Field(5, ge=1, description="seconds that a client is told to wait when the queue is full")
    event_heartbeat_s: float = Field(10.0, gt=0, description="longest silence on a stream of events, in seconds")
    show_harmful: bool = Field(False, description="let clients read harmful completions that they ask for")
    chat: bool = Field(False, description="answer prompts in OpenAI's shape (/v1/chat/completions, /v1/completions)")
    chat_models: list[ModelRole] | None = Field(
        None, min_length=1, description="models that answer, each with an engine of its own; absent: all that there are"
    )
    max_chat_tokens: int = Field(256, ge=1, description="longest answer in tokens; longer requests are cut to it")
    chat_timeout_s: float = Field(
        600.0, gt=0, description="longest wait for an answer, or for the next part of a stream, in seconds"
    )
    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
