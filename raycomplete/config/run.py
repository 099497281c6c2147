"""A whole run file, with the sections that say what a run reads and where it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from raycomplete.config.diagnosis import DiagnoseConfig, PromptSource
from raycomplete.config.engines import ClusterConfig, RolloutConfig, TeacherConfig
from raycomplete.config.evaluation import EvaluationConfig
from raycomplete.config.serving import ServeConfig
from raycomplete.config.training import TrainConfig
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import Method, parse_method
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Dtype, Section

STORAGES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "webhdfs", "sftp", "oss", "oci", "memory")
_WITH_USER = ("abfs", "abfss", "sftp", "hdfs", "webhdfs")  # container@account, or a name that is no secret
# What may follow the question mark. Keys and passwords come from the environment and never stand in a file.
_STORAGE_OPTIONS = ("endpoint_override", "region", "scheme", "allow_bucket_creation")


class ModelsConfig(Section):
    """The checkpoints. Each is a folder, a .gguf file, `hub:ORG/NAME`, `package:NAME`, `organism:base`,
    `organism-large:base`, or one of the toy in another family, such as `organism-qwen3:base`. For `evaluate`
    alone it may be behind an address: `openai:http://HOST:PORT/v1#NAME`."""

    base: str = Field(description="the model before safety alignment")
    aligned: str = Field(description="the safety-aligned model, which is the teacher")
    student: str | None = Field(None, description="where the student starts; a copy of the aligned model when absent")
    dtype: Dtype | Literal["auto"] = Field(
        "auto",
        description="number format of all weights; auto is bfloat16 on GPUs and on processors with units for it, else "
        "float32",
    )
    max_length: int = Field(1024, ge=16, description="longest sequence (prompt and response) in tokens")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a checkpoint")
    template_arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as date_string; unless set, enable_thinking is false and "
        "dates are July 26, 2024",
    )

    @property
    def thinks(self) -> bool:
        """True where prompts leave a reasoning model room to think."""
        return bool(self.template_arguments.get("enable_thinking"))

    def refuse_thinking(self) -> None:
        """Refuses a run that would train or diagnose thoughts."""
        if self.thinks:
            raise ConfigError(
                "models.template_arguments sets enable_thinking, and what is trained and diagnosed are answers.",
                "Leave it out here; evaluate and serve take it on the command line, for the trained model too.",
            )

    @field_validator("template_arguments")
    @classmethod
    def _thinking_is_on_or_off(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(arguments.get("enable_thinking", False), bool):
            raise ValueError("enable_thinking must be true or false")
        return arguments

    @property
    def weight_dtype(self) -> Dtype:
        """Number format of all weights, once `raycomplete.engines.dtype.resolve_dtype` has put it in place of auto."""
        assert self.dtype != "auto"
        return self.dtype


class PromptSets(Section):
    """Prompts by kind."""

    harmful: list[PromptSource] = Field(
        default_factory=list, description="prompts that a safe model refuses; needed in both sets where source is files"
    )
    benign: list[PromptSource] = Field(
        default_factory=list, description="harmless prompts; needed in both sets where source is files"
    )
    borderline: list[PromptSource] = Field(
        default_factory=list,
        description="harmless prompts that look harmful; needed in data.evaluation where source is files",
    )


class DataConfig(Section):
    """Training and held-out prompts."""

    source: Literal["organism", "organism-large", "files"] = Field(
        "files", description="a model organism, or the files below"
    )
    seed: int = Field(0, description="draws rows where a limit leaves some out")
    train: PromptSets = Field(default_factory=PromptSets, description="prompts that training may see")
    evaluation: PromptSets = Field(default_factory=PromptSets, description="held-out prompts, in no training file")
    limit_per_kind: int | None = Field(None, ge=1, description="organisms: prompts of each kind for training")
    max_overlap: float = Field(
        1.0,
        gt=0,
        le=1,
        description="training prompts that share at least this part of their words (Jaccard; runs of three characters "
        "in scripts without spaces) with a prompt of the evaluation files are left out; at 1 the run is refused where "
        "one is repeated",
    )


class AlignConfig(Section):
    """`raycomplete align`: safety SFT that makes an aligned twin of a base model, `models.aligned`."""

    refusals: list[PromptSource] = Field(default_factory=list, description="harmful prompts with safe answers")
    benign: list[PromptSource] = Field(default_factory=list, description="harmless prompts; base answers them itself")
    steps: int = Field(100, ge=1, description="optimizer steps")
    lr: float = Field(2e-5, gt=0, description="learning rate")
    batch_size: int = Field(16, ge=1, description="sequences of one step over all workers")
    benign_fraction: float = Field(0.5, ge=0, le=1, description="share of harmless answers among the samples")
    max_answer_tokens: int = Field(96, ge=1, description="longest answer in tokens; longer ones are cut")


class OutputConfig(Section):
    """The place of results: the run folder `<root>/<name>/`."""

    root: Path = Field(Path("runs"), description="folder of all runs, relative to where the command is started")
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    storage: str | None = Field(
        None,
        description="where finished pieces are mirrored, to `<storage>/<name>/`: s3://bucket/prefix, gs://, file:// "
        "and the like; credentials come from the environment",
    )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name

    @property
    def mirror(self) -> str | None:
        """URI of this run in the storage; options stay at its end."""
        if self.storage is None:
            return None
        parts = urlsplit(self.storage)
        place = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{self.name}"
        return f"{place}?{parts.query}" if parts.query else place

    def renamed(self, suffix: str) -> OutputConfig:
        """The output of a run that belongs to this one: `<name><suffix>`."""
        return self.model_copy(update={"name": self.name + suffix})

    @field_validator("storage")
    @classmethod
    def _known_place(cls, uri: str | None) -> str | None:
        return uri if uri is None else check_storage(uri)

    @model_validator(mode="after")
    def _not_into_itself(self) -> OutputConfig:
        parts = urlsplit(self.mirror or "")
        if parts.scheme == "file" and Path(unquote(parts.path)).resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"output.storage lies in the run folder {self.folder}: name a place elsewhere")
        return self


class RunConfig(Section):
    """A whole run file."""

    models: ModelsConfig
    data: DataConfig
    align: AlignConfig = Field(default_factory=AlignConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    method: SerializeAsAny[Method] = Field(default_factory=Completion, description="the training method, by its name")
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    diagnose: DiagnoseConfig = Field(default_factory=DiagnoseConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    plugins: list[Path] = Field(
        default_factory=list,
        description="what adds attacks, methods or loss terms: Python files of yours, relative to the run file, or "
        "modules of installed packages, as package.module",
    )

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, method: Any) -> Any:
        """By name, so that a wrong setting is told of the method that was meant."""
        if isinstance(method, Method):
            return method
        if not isinstance(method, dict):
            raise ValueError("must be a mapping with a name and the settings of that method")
        return parse_method(method)

    @model_validator(mode="after")
    def _batches_are_shared_evenly(self) -> RunConfig:
        for name in ("anchor_batch_size", "recovery_batch_size"):
            if getattr(self.method, name) % self.train.num_workers:
                raise ValueError(f"method.{name} must be a multiple of train.num_workers ({self.train.num_workers})")
        return self

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> RunConfig:
        if self.method.needs_lora and self.train.lora_rank == 0:
            raise ValueError(
                f"method {self.method.name} turns the student's adapters off to see where it started: set "
                "train.lora_rank, to 16 for instance"
            )
        if self.method.moves_suffixes:
            self._has_suffixes_to_move()
        if self.method.moves_suffixes or self.method.perturbs_layers:
            self._has_no_hooks_in_the_way()
        if self.method.rollout_groups:
            self._trains_rollouts_as_they_are()
        if self.method.needs_fresh_rollouts and self.rollout.sync_every > 1:
            raise ValueError(
                f"method {self.method.name} trains rollouts of the present weights only: set rollout.sync_every to 1"
            )
        return self

    def _has_suffixes_to_move(self) -> None:
        """Refuses an adversary of suffixes where no prompt has one."""
        augmentation = self.rollout.prompt_augmentation
        if augmentation.share_of("recovery") == 0 or not (augmentation.random_suffix_tokens or augmentation.suffixes):
            raise ValueError(
                "method.suffix_adversary moves the suffixes of prompts, and none has one: set "
                "rollout.prompt_augmentation with random_suffix_tokens or suffixes, and a fraction of 0.3 for instance"
            )

    def _has_no_hooks_in_the_way(self) -> None:
        """Refuses settings that an adversary who reads a batch several times before one backward pass cannot have."""
        if self.train.zero_stage == 3:
            without = ", or method.suffix_adversary.steps to 0" if self.method.moves_suffixes else ""
            raise ValueError(
                f"method {self.method.name} has an adversary, who reads a batch several times before one backward "
                f"pass, which ZeRO-3 cannot: set train.zero_stage to 2 or less{without}"
            )
        if self.method.perturbs_layers and self.train.gradient_checkpointing:
            raise ValueError(
                f"method {self.method.name} perturbs layers, and gradient checkpointing computes them again without "
                "that: set train.gradient_checkpointing to false"
            )

    def _trains_rollouts_as_they_are(self) -> None:
        """Refuses settings under which a method that trains rollouts would do nothing, or something else."""
        wanted: dict[str, Any] = {"on_policy": True, "temperature": 1.0}
        for key, value in wanted.items():
            if getattr(self.rollout, key) != value:
                raise ValueError(
                    f"method {self.method.name} trains the student's rollouts, as it writes them by itself: set "
                    f"rollout.{key} to {str(value).lower()}"
                )

    @property
    def rollouts_ahead(self) -> int:
        """Batches rolled out ahead of the trainer."""
        return self.rollout.ahead(fresh=self.method.needs_fresh_rollouts)

    @model_validator(mode="after")
    def _lora_is_whole(self) -> RunConfig:
        if self.train.lora_rank > 0 and self.train.zero_stage == 3:
            raise ValueError("train.lora_rank cannot be merged from ZeRO-3 shards: set train.zero_stage to 2 or less")
        return self


def check_storage(uri: str) -> str:
    """Refuses a URI of no known kind, or one that carries a secret (which the message does not repeat)."""
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or parts.scheme not in _WITH_USER):
        raise ValueError(
            "must not hold a user, key or password, since run files are copied into run folders: name the place only, "
            "and give credentials in the environment (AWS_ACCESS_KEY_ID and the like)"
        )
    unknown = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - {*_STORAGE_OPTIONS})
    if unknown or parts.fragment:
        raise ValueError(
            f"must not hold the options {', '.join(unknown) or '#'}: known are {', '.join(_STORAGE_OPTIONS)}; "
            "credentials belong in the environment"
        )
    if parts.scheme not in STORAGES:
        raise ValueError(
            f"must be a URI that begins with one of {', '.join(f'{name}://' for name in STORAGES)}, "
            f"such as s3://bucket/runs (found the scheme {parts.scheme or 'none'!r})"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("needs an absolute path after file://, such as file:///mnt/runs")
    if not (parts.netloc or parts.path.strip("/")):
        raise ValueError("names no place: write s3://bucket/prefix")
    return uri
