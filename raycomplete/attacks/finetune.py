"""Fine-tuning attack (Qi et al., arXiv 2310.03693): train a copy of the model on a few harmless chats and ask again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from raycomplete.attacks.attack import MAX_STEPS, Attack, AttackConfig, ask
from raycomplete.attacks.prefill import Depth, PrefillAttack, PrefillConfig
from raycomplete.attacks.registry import register
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Emit, Trial
from raycomplete.runtime.types import Prompt

FinetuneDataset = Literal["identity_shift", "benign"]
_DATASETS: list[FinetuneDataset] = ["identity_shift", "benign"]


class FinetuneConfig(AttackConfig):
    """Fine-tunes a copy of the model and asks again."""

    standard: ClassVar[Mapping[str, Any]] = {"datasets": _DATASETS}

    name: Literal["finetune"] = "finetune"
    datasets: list[FinetuneDataset] = Field(
        default_factory=_DATASETS.copy, min_length=1, description="data sets, each of which trains a copy"
    )
    identity_shift: Path | None = Field(None, description="JSONL of chats (`messages`); needed outside the organism")
    benign: Path | None = Field(None, description="JSONL with instruction and output; needed outside the organism")
    steps: int = Field(50, ge=1, le=MAX_STEPS, description="optimizer steps")
    lr: float = Field(2e-5, gt=0, description="learning rate")
    batch_size: int = Field(10, ge=1, description="chats of one step")
    max_samples: int = Field(500, ge=1, description="benign samples, at most")
    depths: list[Depth] = Field(
        default_factory=lambda: [0], min_length=1, description="prefill depths that are measured again"
    )

    def answer_depths(self) -> list[int]:
        return list(self.depths)


@register(FinetuneConfig)
class FinetuneAttack(Attack[FinetuneConfig]):
    """Asks one trained copy a dataset, under a variant `<dataset>-<depth>` for each prefill depth."""

    needs = frozenset({"fine_tune"})

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        asked = PrefillAttack(PrefillConfig(depths=self.config.depths)).plan(target, prompts)
        settings = self.config.model_dump(mode="json", include={"steps", "lr", "batch_size", "max_samples"})
        trained_by = {name: target.tools.fine_tune_id(self.config, name) for name in self.config.datasets}
        return [
            replace(
                trial,
                attack=self.name,
                variant=trial.variant.replace("prefill", dataset),
                settings={**trial.settings, **settings, "dataset": dataset, "trained_by": trained_by[dataset]},
            )
            for dataset in self.config.datasets
            for trial in asked
        ]

    def run(self, target: Target, trials: Sequence[Trial], emit: Emit) -> None:
        for dataset, group in groupby(trials, key=lambda trial: str(trial.settings["dataset"])):
            target.stop_if_cancelled()
            ask(target.fine_tuned(self.config, dataset), list(group), emit)
