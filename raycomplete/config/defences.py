"""Settings of defences at inference: decoders that an evaluation puts around the student, without training it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.registry import checked
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import Section


class DefenceConfig(Section):
    """A defence at inference. Defaults are its authors' settings where they are known."""

    loads_model: ClassVar[bool] = True  # beside the generating engine
    begins_anew: ClassVar[bool] = False  # writes the header of an answer again, in mid-answer
    name: str

    @property
    def checkpoint(self) -> str | None:
        """A further checkpoint that it reads."""
        return None

    @property
    def trains_copy(self) -> bool:
        """Tells whether it trains a copy of the student."""
        return False

    @property
    def needs_training(self) -> bool:
        """Tells whether it learns from training prompts."""
        return self.trains_copy


class ContrastiveDefence(DefenceConfig):
    """Contrastive decoding: each token comes from p (p / p_b)^alpha, p the student's and p_b base's distribution."""

    name: Literal["contrastive"] = "contrastive"
    alpha: float = Field(1.0, gt=0, description="strength")
    plausibility: float = Field(0.1, gt=0, le=1, description="keep tokens with p of at least this share of the best")


class SafeDecodingDefence(DefenceConfig):
    """SafeDecoding (arXiv 2402.08983): an expert that was tuned on refusals moves the first tokens of an answer."""

    name: Literal["safe_decoding"] = "safe_decoding"
    expert: str | None = Field(None, description="checkpoint; tuned on the student's own refusals when absent")

    @property
    def checkpoint(self) -> str | None:
        return self.expert

    @property
    def trains_copy(self) -> bool:
        return self.expert is None


class AnyDepthConfig(DefenceConfig):
    """Settings of defences that look at an answer again at many depths."""

    begins_anew: ClassVar[bool] = True
    every: int = Field(25, ge=1, description="tokens of an answer, prefill included, between two looks")


class ReAskDefence(AnyDepthConfig):
    """ADA by re-asking (arXiv 2510.18081): every few tokens the answer is begun anew; a refusal replaces it all."""

    loads_model: ClassVar[bool] = False
    name: Literal["re_ask"] = "re_ask"


class ProbeDefence(AnyDepthConfig):
    """ADA by probe (arXiv 2510.18081): a linear probe of the state that would begin the answer anew replaces it."""

    name: Literal["probe"] = "probe"
    threshold: float = Field(0.5, gt=0, lt=1, description="probability of harm from which an answer is replaced")
    inverse_penalty: float = Field(1.0, gt=0, description="inverse strength of the fit's L2 penalty, C of scikit-learn")
    refusal: str = Field("I'm sorry, but I can't help with that.", min_length=1, description="what is said instead")

    @property
    def needs_training(self) -> bool:
        return True


DEFENCES: Mapping[str, type[DefenceConfig]] = {
    str(section.model_fields["name"].default): section
    for section in (ContrastiveDefence, SafeDecodingDefence, ReAskDefence, ProbeDefence)
}


def parse_defence(entry: Any) -> DefenceConfig:
    """Checks `evaluation.defence`: a name, or a mapping with `name` and settings. Raises ConfigError."""
    if isinstance(entry, DefenceConfig):
        return entry
    tree = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name = tree.get("name")
    if not isinstance(name, str) or name not in DEFENCES:
        raise ConfigError(f"There is no defence {name!r}.", f"Known defences: {', '.join(DEFENCES)}.")
    return checked(DEFENCES[name], tree, f"defence {name}")
