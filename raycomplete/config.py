"""The typed run file: every setting of a run, checked before torch is imported.

A run file is YAML. Command lines may override single values (`train.steps=50`). Unknown keys are refused with the
nearest known one, and relative paths are resolved against the folder of the run file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raycomplete.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]


class _Section(BaseModel):
    """Frozen; unknown keys are an error (reported by `_explain` with the nearest known key)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelsConfig(_Section):
    """Where the checkpoints are: a folder, a hub id, a .gguf file, `organism:base`, or `package:NAME` (its GGUF)."""

    base: str
    aligned: str
    student: str | None = Field(None, description="start of the student; the aligned model when absent")
    dtype: Dtype = "bfloat16"
    max_length: int = Field(1024, ge=16, description="longest sequence (prompt + response) in tokens")
    trust_remote_code: bool = False


class PromptSource(_Section):
    """One file of prompts (JSONL, JSON, CSV or Parquet) and which of its columns to read."""

    path: Path
    prompt: str = Field("prompt", description="column of the user message")
    context: str | None = Field(None, description="column appended to the user message where it is not empty")
    answer: str | None = Field(None, description="column of the answer")
    where: dict[str, str | bool | int] = Field(default_factory=dict, description="keep rows with these values")
    limit: int | None = Field(None, ge=1, description="keep at most this many rows, drawn under data.seed")


class PromptSets(_Section):
    """Prompt files by what they are for."""

    harmful: list[PromptSource] = Field(default_factory=list)
    benign: list[PromptSource] = Field(default_factory=list)
    borderline: list[PromptSource] = Field(default_factory=list)


class DataConfig(_Section):
    """Training and held-out prompts: the embedded organism, or files."""

    source: Literal["organism", "files"] = "files"
    seed: int = 0
    train: PromptSets = Field(default_factory=PromptSets)
    evaluation: PromptSets = Field(default_factory=PromptSets)
    limit_per_kind: int | None = Field(None, ge=1, description="organism: prompts of each kind for training")


class AlignConfig(_Section):
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


class ScoringConfig(_Section):
    """The vLLM pooling engines that read hidden states of the frozen models."""

    max_num_batched_tokens: int = Field(8192, ge=64)
    gpu_memory_utilization: float = Field(0.25, gt=0, le=1)
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: key-value cache of one engine")
    cache_dir: Path | None = Field(None, description="score cache on disk; none keeps scores in memory only")
    cache_gib: float = Field(2.0, ge=0, description="memory for scores kept by one actor")
    parity_tolerance: float | None = Field(
        None, gt=0, description="largest mean |log p - log p'| at start, nats; by dtype when absent"
    )
    parity_prompts: int = Field(4, ge=1, description="sequences that the start compares with transformers")
    timeout_s: float = Field(600.0, gt=0, description="longest wait for one batch of scores")
    prefetch: int = Field(2, ge=1, description="batches scored ahead of the trainer")


class RolloutConfig(_Section):
    """How responses are sampled: anchor answers, refusals and harmful continuations."""

    gpu_memory_utilization: float = Field(0.25, gt=0, le=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_anchor_tokens: int = Field(64, ge=4, description="length of the aligned model's own answers")
    max_refusal_tokens: int = Field(32, ge=4, description="length of the refusals that recovery teaches")
    max_harmful_tokens: int = Field(96, ge=4, description="length of harmful continuations")
    affirmative_prefix: str = Field("Sure, here is", description="prefill under which continuations are sampled")
    harmful_from: Literal["base", "student"] = "base"
    answers_per_prompt: int = Field(1, ge=1, description="anchor answers and refusals sampled for each prompt")
    safety_prompt: str | None = Field(None, description="system prompt that only the teacher sees, where it answers")
    timeout_s: float = Field(1800.0, gt=0, description="longest wait for one call to an engine")


class LossWeights(_Section):
    """Weights of the three parts of the loss."""

    anchor: float = Field(1.0, ge=0)
    recovery: float = Field(1.0, ge=0)
    penalty: float = Field(0.1, ge=0)


class PenaltyConfig(_Section):
    """Base-favored penalty: threshold tau on p_base, scale kappa (nats) of the deficit."""

    tau: float = Field(0.01, ge=0, le=1)
    kappa: float = Field(0.5, gt=0)


class ContrastiveConfig(_Section):
    """Optional contrastive teacher q ~ p_a (p_a / p_b)^alpha; alpha 0 is off."""

    alpha: float = Field(0.0, ge=0)
    plausibility: float = Field(0.1, gt=0, le=1, description="keep v with p_a(v) >= plausibility * max p_a")


class DepthConfig(_Section):
    """From which depths recovery is trained."""

    min: int = Field(1, ge=1, description="depth 0 belongs to the anchor")
    max: int = Field(64, ge=1)
    schedule: Literal["adaptive", "uniform"] = "adaptive"
    bins: int = Field(8, ge=1)
    uniform_floor: float = Field(0.3, ge=0, le=1, description="share of draws that stays uniform")
    decay: float = Field(0.9, ge=0, lt=1, description="memory of the running mean of the loss by depth")

    @model_validator(mode="after")
    def _ordered(self) -> DepthConfig:
        if self.max < self.min:
            raise ValueError(f"train.depth.max ({self.max}) is below train.depth.min ({self.min})")
        return self


class TrainConfig(_Section):
    """Ray Train + DeepSpeed. Batch sizes count sequences of one optimizer step over all workers."""

    steps: int = Field(100, ge=1)
    lr: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)
    num_workers: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    anchor_batch: int = Field(16, ge=1)
    recovery_batch: int = Field(16, ge=1)
    micro_batch: int = Field(16, ge=1, description="sequences of one forward pass on one worker")
    loss_chunk_tokens: int = Field(512, ge=1, description="token rows whose logits exist at a time")
    gradient_checkpointing: bool = False
    weights: LossWeights = Field(default_factory=LossWeights)
    penalty: PenaltyConfig = Field(default_factory=PenaltyConfig)
    contrastive: ContrastiveConfig = Field(default_factory=ContrastiveConfig)
    depth: DepthConfig = Field(default_factory=DepthConfig)
    checkpoint_every: int = Field(25, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    stall_timeout_s: float = Field(1800.0, gt=0, description="longest time without a finished step")

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        for name in ("anchor_batch", "recovery_batch"):
            if getattr(self, name) % self.num_workers:
                raise ValueError(f"train.{name} must be a multiple of train.num_workers ({self.num_workers})")
        return self


class EvaluationConfig(_Section):
    """The prefill-depth curve, utility and over-refusal."""

    depths: list[int] = Field(default_factory=lambda: [0, 4, 8, 16, 32, 64], min_length=1)
    max_tokens: int = Field(64, ge=1, description="tokens that the model may add to a prefill")
    max_utility_tokens: int = Field(128, ge=1)
    prompts: int = Field(100, ge=1, description="held-out prompts of each kind")
    save_completions: bool = Field(False, description="keep what models said; never needed for the rates")

    @field_validator("depths")
    @classmethod
    def _sorted_unique(cls, depths: list[int]) -> list[int]:
        if any(depth < 0 for depth in depths):
            raise ValueError("evaluation.depths must not be negative")
        return sorted(set(depths))


class ClusterConfig(_Section):
    """Which Ray cluster, and what each role asks of it. GPUs are used where `use_gpu` finds them."""

    address: str | None = Field(None, description="None: the current job's cluster, else a local one is started")
    use_gpu: Literal["auto", "never", "always"] = "auto"
    cpus_per_engine: float = Field(0.5, gt=0)
    gpus_per_engine: float = Field(0.2, ge=0)
    cpus_per_worker: float = Field(0.5, gt=0)
    gpus_per_worker: float = Field(0.4, ge=0)
    start_timeout_s: float = Field(600.0, gt=0, description="longest wait for actors to be placed and ready")


class OutputConfig(_Section):
    """Where results go: `<root>/<name>/`."""

    root: Path = Path("runs")
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @property
    def folder(self) -> Path:
        return self.root / self.name


class RunConfig(_Section):
    """A whole run file."""

    models: ModelsConfig
    data: DataConfig
    align: AlignConfig = Field(default_factory=AlignConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="after")
    def _lora_is_whole(self) -> RunConfig:
        if self.align.lora_rank > 0 and self.train.zero_stage == 3:
            raise ValueError("align.lora_rank cannot be merged from ZeRO-3 shards: set train.zero_stage to 2 or less")
        return self


def load_run_file(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads and checks a run file.

    Args:
        path: YAML file.
        overrides: `key.sub=value` strings, values in YAML notation, applied last.

    Raises:
        ConfigError: The file is missing, not YAML, or holds a wrong key or value.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The run file {file} cannot be read ({error.strerror}).", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The run file {file} is not UTF-8 text ({error.reason}).", "Check the path.") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The run file {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"The run file {file} must hold a mapping with the keys {_names(RunConfig)}.")
    for override in overrides:
        _apply_override(tree, override)
    return parse(tree, str(file), base_folder=file.resolve().parent)


def parse(tree: Mapping[str, Any], origin: str, base_folder: Path | None = None) -> RunConfig:
    """Checks a run file that is already a mapping; `origin` names it in messages."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(dict(item)) for item in error.errors())
        raise ConfigError(f"{origin}: {problems}") from error
    return config if base_folder is None else resolve_paths(config, base_folder)


def resolve_paths(config: RunConfig, base_folder: Path) -> RunConfig:
    """Input paths relative to the run file become absolute; `output.root` stays relative to where the user stands."""

    def absolute(path: Path) -> Path:
        return path if path.is_absolute() else (base_folder / path).resolve()

    def sources(items: list[PromptSource]) -> list[PromptSource]:
        return [item.model_copy(update={"path": absolute(item.path)}) for item in items]

    def sets(item: PromptSets) -> PromptSets:
        return PromptSets(**{kind: sources(getattr(item, kind)) for kind in PromptSets.model_fields})

    data = config.data.model_copy(update={"train": sets(config.data.train), "evaluation": sets(config.data.evaluation)})
    align = config.align.model_copy(
        update={"refusals": sources(config.align.refusals), "benign": sources(config.align.benign)}
    )
    return config.model_copy(update={"data": data, "align": align})


def dump(config: RunConfig) -> str:
    """The resolved run file as YAML; `load_run_file` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"The override {override!r} is not of the form key.sub=value.")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"The override {override!r} goes below {parent!r}, which holds a plain value.")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is not valid YAML.") from error


def _names(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _explain(item: dict[str, Any]) -> str:
    """One pydantic error in words, with the nearest known key where a key is unknown."""
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}, {hint}"
    if item["type"] == "missing":
        return f"the key {where!r} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at a location, list indices skipped."""
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        arguments = [item for item in getattr(annotation, "__args__", ()) if _is_section(item)]
        section = annotation if _is_section(annotation) else arguments[0]
    return list(section.model_fields)


def _is_section(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)
