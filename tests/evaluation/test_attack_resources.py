"""Chats of the fine-tuning attack as training samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.finetune import FinetuneConfig
from raycomplete.attacks.trial import EvaluationCancelled
from raycomplete.config import load_run_file
from raycomplete.data.inputs import prepare_models, prepare_prompts
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.run import Run
from raycomplete.evaluation import attack_resources
from raycomplete.evaluation.attack_resources import chat_samples, fine_tune
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import StoppedError


class Words:
    """A codec of one token a word."""

    eos_id = 0

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        return [1] * len(text.split())

    def encode_answer(self, text: str) -> list[int]:
        return [2] * len(text.split())


def test_no_sample_is_longer_than_the_context() -> None:
    chats = [(None, "one two", "a b"), (None, "one two", "a b c d e f"), (None, "one two three four five six", "a b c")]
    codec: Any = Words()
    samples = chat_samples(codec, chats, 5)
    assert [sample.sample_id for sample in samples] == ["chat-0", "chat-1"]
    assert [sample.answer_ids for sample in samples] == [(2, 2, 0), (2, 2, 2)], "what is cut does not end"


def test_a_training_that_is_stopped_cancels_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(job: object, *, stopping: Callable[[], bool], **_: object) -> None:
        assert stopping()
        raise StoppedError("Stopped after step 3.", "Resume with --resume.")

    monkeypatch.setattr(attack_resources, "fit", stopped)
    config = load_run_file("jobs/organism.yaml")
    models = prepare_models(config)
    prompts = prepare_prompts(config, models.codec)
    run = Run(config, tmp_path, models, prompts, Console(quiet=True), Cluster(use_gpu=False), cancelled=lambda: True)
    with pytest.raises(EvaluationCancelled, match="Stopped after step 3"):
        fine_tune(run, FinetuneConfig(steps=5), "identity_shift", models.paths["aligned"])
