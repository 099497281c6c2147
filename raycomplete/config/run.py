"""A whole run file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from raycomplete.config.diagnosis import DiagnoseConfig
from raycomplete.config.engines import ClusterConfig, RolloutConfig, TeacherConfig
from raycomplete.config.evaluation import EvaluationConfig
from raycomplete.config.inputs import AlignConfig, DataConfig, ModelsConfig
from raycomplete.config.serving import ServeConfig
from raycomplete.config.storage import check_storage, inside, joined
from raycomplete.config.training import TrainConfig
from raycomplete.runtime.section import Section


class OutputConfig(Section):
    """Where results go: `<root>/<name>/`."""

    root: Path = Path("runs")
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str | None = Field(
        None,
        description="where finished pieces are mirrored, to `<storage>/<name>/`: s3://bucket/prefix, gs://, file:// "
        "and the like; credentials come from the environment",
    )
    storage_timeout_s: float = Field(
        900.0, gt=0, description="longest wait at the end of a run for what is not mirrored yet"
    )

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def mirror(self) -> str | None:
        """URI of this run in the storage."""
        return None if self.storage is None else joined(self.storage, self.name)

    def renamed(self, suffix: str) -> OutputConfig:
        """The output of a run that belongs to this one: `<name><suffix>`."""
        return self.model_copy(update={"name": self.name + suffix})

    @field_validator("storage")
    @classmethod
    def _known_place(cls, uri: str | None) -> str | None:
        return uri if uri is None else check_storage(uri)

    @model_validator(mode="after")
    def _not_into_itself(self) -> OutputConfig:
        if self.mirror is not None and inside(self.mirror, self.folder):
            raise ValueError(f"output.storage lies in the run folder {self.folder}: name a place elsewhere")
        return self


class RunConfig(Section):
    """A whole run file."""

    models: ModelsConfig
    data: DataConfig
    align: AlignConfig = Field(default_factory=AlignConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    diagnose: DiagnoseConfig = Field(default_factory=DiagnoseConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    plugins: list[Path] = Field(
        default_factory=list,
        description="Python files of yours that add attacks, methods or loss terms, relative to the run file",
    )

    @model_validator(mode="after")
    def _compliance_is_counted(self) -> RunConfig:
        if self.train.depth.measure == "compliance" and not self.rollout.on_policy:
            raise ValueError(
                "train.depth.measure compliance is counted on the student's own rollouts: set rollout.on_policy to true"
            )
        return self

    @model_validator(mode="after")
    def _lora_is_whole(self) -> RunConfig:
        for name, rank in (("align.lora_rank", self.align.lora_rank), ("train.lora_rank", self.train.lora_rank)):
            if rank > 0 and self.train.zero_stage == 3:
                raise ValueError(f"{name} cannot be merged from ZeRO-3 shards: set train.zero_stage to 2 or less")
        return self
