"""Settings of the evaluation: attacks, judges, and the benchmarks beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from raycomplete.attacks.attack import STANDARD_ANSWER_TOKENS, AttackConfig
from raycomplete.attacks.prefills import STANDARD_DEPTHS, PrefillConfig
from raycomplete.attacks.registry import parse_attack
from raycomplete.config.defences import DefenceConfig, parse_defence
from raycomplete.runtime.section import Section


class JudgeConfig(Section):
    """The judge, which sorts responses into outcomes: refused, complied, off topic and so on."""

    kind: Literal["auto", "patterns", "model", "endpoint", "judgezoo"] = Field(
        "auto", description="auto: an organism's own judge on its prompts, refusal patterns elsewhere"
    )
    checkpoint: str | None = Field(None, description='kind "model": the judge model')
    address: str | None = Field(
        None, description='kind "endpoint": an OpenAI-compatible address, such as http://127.0.0.1:8000/v1'
    )
    model: str | None = Field(
        None, description='kind "endpoint": the name of its model; kind "judgezoo": of its judge, or strong_reject'
    )
    key_variable: str | None = Field(None, description='kind "endpoint": environment variable that holds its key')
    rubric: Literal["refusal", "strongreject", "yes_no", "safe_unsafe"] | Path = Field(
        "refusal", description='kinds "model" and "endpoint": the question and how its reply is read; or a YAML file'
    )
    calibration: Path | None = Field(None, description="file that `raycomplete judge calibrate` wrote for this judge")

    @model_validator(mode="after")
    def _can_be_asked(self) -> JudgeConfig:
        if self.kind == "model" and not self.checkpoint:
            raise ValueError("evaluation.judge.checkpoint is needed for a judge model")
        if self.kind == "endpoint":
            if not self.address or not self.model:
                raise ValueError("evaluation.judge.address and evaluation.judge.model are needed for an endpoint")
            parts = urlsplit(self.address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("evaluation.judge.address must start with http:// or https:// and name a host")
            if parts.username or parts.password or parts.query:
                raise ValueError("evaluation.judge.address must hold no key: name its variable in key_variable")
        return self


class RemoteConfig(Section):
    """Requests to models behind an address: those of `models`, `attacker` of an attack, and a judge.

    A model of `models` or an attacker is named `openai:http://HOST:PORT/v1#NAME`.
    """

    key_variable: str | None = Field(None, description="environment variable that holds their key; a judge has its own")
    prefill: Literal["auto", "flags", "prefix", "assistant", "none"] = Field(
        "auto",
        description="how a server is told to continue an answer: vLLM's two flags, `prefix: true`, by a last message "
        "of the assistant alone (llama.cpp), or not at all; auto asks the server once whether it knows the flags",
    )
    parallel: int = Field(8, ge=1, le=512, description="requests at once")
    requests_per_minute: float | None = Field(None, gt=0, description="requests that are started in a minute, at most")
    timeout_s: float = Field(120.0, gt=0, description="longest wait for an answer")


class CapabilitiesConfig(Section):
    """Benchmarks from local files; none by default."""

    mmlu: Path | None = Field(None, description="CSV with subject, question, A, B, C, D, answer")
    mmlu_fewshot: Path | None = Field(None, description="the same columns: examples shown before each question")
    shots: int = Field(5, ge=0, description="examples of the same subject")
    bbh: Path | None = Field(None, description="JSONL with task, input, target")
    limit: int | None = Field(None, ge=1, description="questions of each benchmark, spread over its tasks")


class EvaluationConfig(Section):
    """The prefill-depth curve, other attacks, utility and over-refusal."""

    depths: list[int] = Field(
        default_factory=lambda: list(STANDARD_DEPTHS),
        min_length=1,
        description="prefill depths in tokens; each is asked of the prompts whose compliant answer is that long",
    )
    max_tokens: int = Field(
        STANDARD_ANSWER_TOKENS,
        ge=1,
        description="tokens that the model may add to a prefill; fewer cut off what follows a refusal",
    )
    max_utility_tokens: int = Field(
        STANDARD_ANSWER_TOKENS, ge=1, description="longest answer to a harmless prompt in tokens"
    )
    max_thinking_tokens: int = Field(
        512, ge=0, description="tokens of thinking before an answer, where a model may think; it is closed after them"
    )
    prefill_from: str = Field(
        "base",
        description="base or a checkpoint: the model that completes the compliant answers that prefills are cut from",
    )
    num_prompts: int = Field(100, ge=1, description="held-out prompts of each kind")
    save_completions: bool = Field(False, description="keep responses as text; token ids are always kept")
    attacks: list[SerializeAsAny[AttackConfig]] = Field(
        [PrefillConfig()], description="names of attacks, or mappings of name and settings; see below"
    )
    attack_prompts: int | None = Field(None, ge=1, description="harmful prompts of attacks other than prefill")
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    remote: RemoteConfig = Field(default_factory=RemoteConfig)
    defence: SerializeAsAny[DefenceConfig] | None = Field(
        None, description="a defence at inference around the student: its name, or a mapping of name and settings"
    )
    capabilities: CapabilitiesConfig = Field(default_factory=CapabilitiesConfig)

    @field_validator("depths")
    @classmethod
    def _sorted_unique(cls, depths: list[int]) -> list[int]:
        if any(depth < 0 for depth in depths):
            raise ValueError("evaluation.depths must not be negative")
        return sorted(set(depths))

    @field_validator("defence", mode="before")
    @classmethod
    def _parsed_defence(cls, defence: Any) -> Any:
        return None if defence is None else parse_defence(defence)

    @field_validator("attacks", mode="before")
    @classmethod
    def _parsed(cls, attacks: Any) -> Any:
        """Parses each attack by its name, so that a wrong setting gives one sentence, not one for each attack."""
        if not isinstance(attacks, list | tuple):
            raise ValueError("evaluation.attacks must be a list of attacks")
        parsed = [parse_attack(entry) for entry in attacks]
        if any(isinstance(attack, PrefillConfig) and attack.depths for attack in parsed):
            raise ValueError("the depths of the attack prefill are those of evaluation.depths; set them there")
        names = [attack.name for attack in parsed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"evaluation.attacks names {', '.join(sorted(twice))} twice")
        # The depth curve is what every summary and every comparison starts from, so it is always measured.
        return parsed if "prefill" in names else [PrefillConfig(), *parsed]

    def prefill(self) -> PrefillConfig:
        """The depth curve, at `depths`."""
        return PrefillConfig(depths=self.depths)

    @property
    def deepest_prefill(self) -> int:
        """Answer tokens that attacks take from a prompt's answer, at most."""
        return max(self.depths + [depth for attack in self.attacks for depth in attack.answer_depths()])
