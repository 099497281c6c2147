"""Small models with planted differences, and stand-ins for engines, shared by the tests of the diagnosis."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomplete.config import RunConfig, parse
from raycomplete.data.inputs import Prompts
from raycomplete.diagnosis.measurement import Measurement
from raycomplete.diagnosis.samples import DiagnosisSample
from raycomplete.engines.run import Run
from raycomplete.losses import Head
from raycomplete.runtime.console import Console
from raycomplete.runtime.types import Outcome, Prompt

VOCAB, HIDDEN = 23, 6


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class PlantedScorer:
    """Hidden states by token and position; what is planted is added at the first positions of a response."""

    def __init__(self, planted_TH: torch.Tensor | None = None) -> None:
        self.embedding_VH = normal(1, 512, HIDDEN)
        self.planted_TH = torch.zeros(0, HIDDEN) if planted_TH is None else planted_TH
        self.under_way = self.most_under_way = self.read = 0

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return list(sequences)

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        self.under_way -= 1
        found = []
        for tokens, num_prompt in reference:
            self.read += 1
            states_TH = self.embedding_VH[list(tokens)].cumsum(0)[num_prompt - 1 : -1].tanh()
            length = min(len(states_TH), len(self.planted_TH))
            states_TH[:length] += self.planted_TH[:length]
            found.append(states_TH)
        return found


def planted_measurement(**planted: torch.Tensor | None) -> Measurement:
    sources = {"base": PlantedScorer(), **{role: PlantedScorer(change) for role, change in planted.items()}}
    head = Head(normal(2, VOCAB, HIDDEN))
    return Measurement(sources, dict.fromkeys(sources, head), (3,))


def some_samples(lengths: Sequence[int], seed: int = 0) -> list[DiagnosisSample]:
    draw = np.random.default_rng(seed)
    return [
        DiagnosisSample(
            f"p{index}", tuple(draw.integers(0, VOCAB, 4).tolist()), tuple(draw.integers(0, VOCAB, length).tolist())
        )
        for index, length in enumerate(lengths)
    ]


class ModelScorer(PlantedScorer):
    """Hidden states of a transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @torch.inference_mode()
    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        return [
            self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0, num_prompt - 1 :].clone()
            for tokens, num_prompt in reference
        ]


class FakeGenerator:
    """Continues every sequence with tokens that its content, length and seed decide."""

    path = "fake"

    def __init__(self, length: int = 9) -> None:
        self.length = length
        self.seeds: list[int | None] = []

    def with_weights(self, path: str) -> FakeGenerator:
        return self

    def generate(
        self, sequences: Sequence[Sequence[int]], *, max_tokens: int, seed: int | None = None, **_: Any
    ) -> list[list[int]]:
        self.seeds.append(seed)
        found = []
        for index, sequence in enumerate(sequences):
            digest = hashlib.sha256(f"{list(sequence)}:{seed}:{index}".encode()).digest()
            found.append([value % VOCAB for value in digest][: min(max_tokens, self.length)])
        return found


class LetterCodec:
    """One token a letter."""

    vocab_size = VOCAB

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        return [1, *self.encode_answer(text), 2]

    def encode_answer(self, text: str) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(f"t{token}" for token in token_ids)


class FakeJudge:
    """Refuses to call a response compliant where its first token is even."""

    name = "fake"

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        return Outcome.COMPLIED if int(continuation.split()[0][1:]) % 2 else Outcome.REFUSED


class FakeEngines:
    def __init__(self, length: int = 9) -> None:
        self.generator = FakeGenerator(length)


class FakeModels:
    paths: dict[Any, Path] = dict.fromkeys(("base", "aligned", "student"), Path("fake"))
    codec = LetterCodec()

    def fingerprint(self, role: str) -> str:
        return role


def a_config(tmp_path: Path, **diagnosis: Any) -> RunConfig:
    tree = {
        "models": {"base": "organism:base", "aligned": "organism:aligned", "max_length": 40},
        "data": {"source": "files"},
        "rollout": {"affirmative_prefixes": ["ok"]},
        "diagnose": {"max_tokens": 24, "num_prompts": 10, **diagnosis},
        "output": {"root": str(tmp_path), "name": "x"},
    }
    return parse(tree, "test")


class PlantedRun(Run):
    """A run whose judge, models and engines are stand-ins."""

    @property
    def judge(self) -> Any:
        return FakeJudge()


def a_run(config: RunConfig, folder: Path, length: int = 9) -> Run:
    """A run whose engines write answers of `length` tokens."""
    models: Any = FakeModels()
    cluster: Any = None
    engines: Any = FakeEngines(length)
    run = PlantedRun(config, folder, models, Prompts({}, {}), Console(quiet=True), cluster)
    run.engines = engines
    return run


def some_prompts(count: int, answer: str | None = None, kind: Any = "harmful") -> list[Prompt]:
    return [Prompt(f"p{index}", f"prompt {index}", kind, answer) for index in range(count)]
