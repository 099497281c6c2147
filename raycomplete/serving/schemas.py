"""Bodies of the HTTP interface."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from raycomplete.attacks.registry import ATTACKS
from raycomplete.runtime.types import MODEL_ROLES, ModelRole

ModelSpec = Annotated[str, Field(min_length=1, max_length=1024)]


def _attack_schema() -> dict[str, Any]:
    """A name, or a mapping of name and settings, for every attack that there is."""
    names, objects = [], []
    for name, attack in ATTACKS.items():
        schema = attack.config_class.model_json_schema(ref_template="#/components/schemas/{model}")
        required = schema.get("required", [])
        names += [] if required else [name]  # one that needs a setting cannot be asked for by name alone
        schema["properties"]["name"], schema["required"] = {"const": name}, sorted({"name", *required})
        objects.append(schema)
    return {"anyOf": [{"enum": names}, *objects]}


Attack = Annotated[str | dict[str, Any], WithJsonSchema(_attack_schema())]


class Body(BaseModel):
    """A request body: unknown keys are an error, and so is text that no encoding can carry."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _can_be_stored(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            try:
                json.dumps(tree, ensure_ascii=False, allow_nan=False).encode()
            except (UnicodeEncodeError, ValueError, RecursionError) as error:
                raise ValueError("the body holds NaN, infinity, a lone surrogate or too deep a nesting") from error
        return tree


class ModelChoice(Body):
    """Checkpoints instead of those of the server's run file."""

    base: ModelSpec | None = None
    aligned: ModelSpec | None = None
    student: ModelSpec | None = None


class EvaluationRequest(Body):
    """An evaluation to be made; what is left out is as in the server's run file. Prefill depths are always measured."""

    label: str = Field("", max_length=200, description="your own name for it")
    models: ModelChoice = Field(default_factory=ModelChoice)
    roles: list[ModelRole] = Field(
        list(MODEL_ROLES), min_length=1, max_length=3, json_schema_extra={"uniqueItems": True}
    )
    attacks: list[Attack] | None = Field(None, max_length=len(ATTACKS))
    depths: list[Annotated[int, Field(ge=0, le=4096)]] | None = Field(None, min_length=1, max_length=64)
    max_tokens: int | None = Field(None, ge=1, le=4096, description="tokens that a model may add to a prefill")
    num_prompts: int | None = Field(None, ge=1, description="held-out prompts of each kind")
    attack_prompts: int | None = Field(None, ge=1, description="harmful prompts of attacks other than prefill")
    seed: int | None = Field(None, ge=0, lt=2**31, description="draws the held-out prompts")
    save_completions: bool | None = Field(None, description="keep what models said")


class Problem(BaseModel):
    """The reason why a request was not served; `known` has the names that exist where it named another."""

    problem: str
    remedy: str = ""
    known: list[str] | None = None


class State(StrEnum):
    """State of an evaluation. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class EvaluationView(BaseModel):
    """An evaluation as clients see it: times are seconds since the epoch, `progress` is the newest of each role."""

    id: str
    label: str
    state: State
    cancelling: bool
    attempts: int
    error: str | None
    progress: dict[str, dict[str, Any]]
    request: dict[str, Any]
    created: float
    started: float | None
    finished: float | None


class EvaluationDetail(EvaluationView):
    """One evaluation with its results: the run's `summary.json`, once there is one."""

    results: dict[str, Any] | None


class EvaluationPage(BaseModel):
    """Evaluations, newest first. `next` is the `before` of the following page; None on the last."""

    items: list[EvaluationView]
    total: int
    next: int | None


class SampleView(BaseModel):
    """One response; withheld text is None, and so is the outcome of a benchmark, which has right answers instead."""

    role: str
    attack: str
    variant: str
    prompt_id: str
    seed: int
    outcome: str | None
    harmful: bool
    prefill: str | None
    continuation: str | None


class SamplePage(BaseModel):
    """Samples in the order of the evaluation. `saved` is false where the evaluation kept none."""

    items: list[SampleView]
    total: int
    saved: bool


class Options(BaseModel):
    """Everything that this server allows; `chat` names the models that answer prompts."""

    attacks: list[str]
    models: list[str]
    model_roots: list[str]
    defaults: dict[str, Any]
    max_prompts: int
    show_harmful: bool
    chat: list[str]
