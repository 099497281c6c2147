"""Settings of defences at inference: decoders that an evaluation puts around the student, without training it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from raycomplete.attacks.registry import checked
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section


class DefenceConfig(Section):
    """A defence at inference. Defaults are its authors' settings where they are known."""

    name: str


class ContrastiveDefence(DefenceConfig):
    """Contrastive decoding: each token comes from p (p / p_b)^alpha, p the student's and p_b base's distribution."""

    name: Literal["contrastive"] = "contrastive"
    alpha: float = Field(1.0, gt=0, description="strength")
    plausibility: float = Field(0.1, gt=0, le=1, description="keep tokens with p of at least this share of the best")
    batch: int = Field(16, ge=1, description="sequences decoded side by side")


class SafeDecodingDefence(DefenceConfig):
    """SafeDecoding (arXiv 2402.08983): an expert that was tuned on refusals moves the first tokens of an answer."""

    name: Literal["safe_decoding"] = "safe_decoding"
    alpha: float = Field(3.0, ge=0, description="how far from the student to the expert and beyond: 1 is the expert")
    first_tokens: int = Field(2, ge=1, description="tokens of an answer that are moved")
    common: int = Field(5, ge=1, description="tokens among the likeliest of both models that may be said")
    expert: str | None = Field(None, description="checkpoint; tuned on the student's own refusals when absent")
    expert_prompts: int = Field(36, ge=1, description="harmful training prompts whose refusals it is tuned on")
    expert_lr: float = Field(2e-3, gt=0, description="learning rate of that")
    expert_epochs: int = Field(2, ge=1, description="passes over the refusals")
    expert_rank: int = Field(16, ge=0, description="rank of its adapters, merged at the end; 0 trains all weights")
    batch: int = Field(16, ge=1, description="sequences decoded side by side")


class AnyDepthConfig(DefenceConfig):
    """Settings of defences that look at an answer again at many depths."""

    every: int = Field(25, ge=1, description="tokens of an answer, prefill included, between two looks")


class ReAskDefence(AnyDepthConfig):
    """ADA by re-asking (arXiv 2510.18081): every few tokens the answer is begun anew; a refusal replaces it all."""

    name: Literal["re_ask"] = "re_ask"
    max_tokens: int = Field(20, ge=1, description="tokens of what is said anew, greedily")


class ProbeDefence(AnyDepthConfig):
    """ADA by probe (arXiv 2510.18081): a linear probe of the state that would begin the answer anew replaces it."""

    name: Literal["probe"] = "probe"
    layer: float = Field(0.5, ge=0, le=1, description="layer whose input is probed, as a share of the depth")
    threshold: float = Field(0.5, gt=0, lt=1, description="probability of harm from which an answer is replaced")
    inverse_penalty: float = Field(1.0, gt=0, description="inverse strength of the fit's L2 penalty, C of scikit-learn")
    prompts: int = Field(200, ge=4, description="training prompts of each kind whose answers it is fitted on")
    answer_tokens: int = Field(500, ge=1, description="tokens of such an answer, at most")
    refusal: str = Field("I'm sorry, but I can't help with that.", min_length=1, description="what is said instead")


DEFENCES: Mapping[str, type[DefenceConfig]] = {
    str(section.model_fields["name"].default): section
    for section in (ContrastiveDefence, SafeDecodingDefence, ReAskDefence, ProbeDefence)
}


def parse_defence(entry: Any) -> DefenceConfig:
    """Checks `evaluation.defence`: a name, or a mapping with `name` and settings.

    Raises:
        ConfigError: There is no such defence, or a setting is unknown or wrong.
    """
    if isinstance(entry, DefenceConfig):
        return entry
    tree = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name = tree.get("name")
    if not isinstance(name, str) or name not in DEFENCES:
        raise ConfigError(f"There is no defence {name!r}.", f"Known defences: {', '.join(DEFENCES)}.")
    return checked(DEFENCES[name], tree, f"defence {name}")
