"""Fine-tuning attack (Qi et al., arXiv 2310.03693): train a copy of the model on a few harmless chats and ask again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from raycomplete.attacks.attack import Attack, continued, grouped
from raycomplete.attacks.prefill import Prefill
from raycomplete.attacks.settings import FinetuneAttack, PrefillAttack
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Emit, Trial
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.types import Prompt


class Finetune(Attack[FinetuneAttack]):
    """A variant `<dataset>-<depth>` for each dataset and prefill depth, on one trained copy a dataset."""

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        if target.tools.fine_tune is None:
            raise SetupError("The attack finetune needs a trainer.", "Run it by raycomplete evaluate.")
        asked = Prefill(PrefillAttack(depths=self.config.depths)).plan(target, prompts)
        settings = self.config.model_dump(mode="json", include={"steps", "lr", "batch_size", "max_samples"})
        trained_by = target.tools.fine_tune_ids
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
        assert target.tools.fine_tune is not None, "plan refuses without a trainer"
        for dataset, group in groupby(trials, key=lambda trial: str(trial.settings["dataset"])):
            target.stop_if_cancelled()
            tuned = replace(target, generator=target.tools.fine_tune(self.config, dataset))
            for batch in grouped(list(group)):
                emit(list(zip(batch, continued(tuned, batch), strict=True)))
