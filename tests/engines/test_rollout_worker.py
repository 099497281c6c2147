"""The rollout actor on a real vLLM engine: right tokens, right weights, reproducible samples, sleep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.spec import EngineSpec
from tests.engines.tiny import log_probs_of, make_model, options, random_probe

pytestmark = pytest.mark.slow

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def sequences(codec: ChatCodec) -> list[list[int]]:
    return [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 12)]


def greedy_by_transformers(role: str, sequences: list[list[int]], eos_ids: frozenset[int]) -> list[list[int]]:
    model = load_model(checkpoint_path(role), "float32")  # type: ignore[arg-type]
    answers = []
    for sequence in sequences:
        tokens: list[int] = []
        while len(tokens) < MAX_TOKENS:
            with torch.inference_mode():
                token = int(model(torch.tensor([sequence + tokens])).logits[0, -1].argmax())
            if token in eos_ids:
                break
            tokens.append(token)
        answers.append(tokens)
    return answers


def test_other_weights_take_the_place_of_the_first_ones_entirely(
    generator: Any, codec: ChatCodec, sequences: list[list[int]]
) -> None:
    """The organism's head is tied: a reload that forgets the head speaks with a mixture of the two models."""
    expected = {role: greedy_by_transformers(role, sequences, codec.eos_ids) for role in ("base", "aligned")}
    assert expected["base"] != expected["aligned"]
    for role in ("base", "aligned", "base"):
        client = generator.with_weights(str(checkpoint_path(role)))  # type: ignore[arg-type]
        assert client.generate(sequences, max_tokens=MAX_TOKENS) == expected[role], role


def test_seeded_samples_repeat_and_other_seeds_differ(generator: Any, sequences: list[list[int]]) -> None:
    aligned = generator.with_weights(str(checkpoint_path("aligned")))
    draws = [aligned.generate(sequences, max_tokens=16, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_response_that_ended_says_so_and_holds_no_end_token(
    generator: Any, codec: ChatCodec, sequences: list[list[int]]
) -> None:
    aligned = generator.with_weights(str(checkpoint_path("aligned")))
    for tokens, finished in aligned.generate_finished(sequences, max_tokens=60):
        assert finished
        assert not codec.eos_ids & set(tokens)
    for tokens, finished in aligned.generate_finished(sequences, max_tokens=3):
        assert (len(tokens), finished) == (3, False)


@pytest.fixture
def pool(ray_cluster: None, tmp_path: Path) -> Iterator[RolloutPool]:
    path = make_model(tmp_path / "model", 0, tied=True, dtype="bfloat16")
    spec = EngineSpec(str(path), "bfloat16", 128, use_gpu=True, sleeps=True, num_gpus=0.5)
    pool = RolloutPool.start(replace(options(), spec=spec))
    yield pool
    pool.stop()


def free_bytes(worker: Any) -> tuple[int, int]:
    """Free memory of the device with the engine asleep and awake."""
    asleep = torch.cuda.mem_get_info()[0]
    with worker._engine.awake():
        awake = torch.cuda.mem_get_info()[0]
    return asleep, awake


@pytest.mark.gpu
def test_an_engine_that_sleeps_frees_the_device_and_takes_weights(pool: RolloutPool, tmp_path: Path) -> None:
    pool.wait_until_ready(timeout_s=300)
    asleep, awake = ray.get(pool._actors[0].__ray_call__.remote(free_bytes), timeout=60)
    assert asleep > awake + 2**30  # the key-value cache alone is larger
    probe = random_probe(0)
    for version in (1, 2):
        model = load_model(make_model(tmp_path / str(version), version, tied=True, dtype="bfloat16"), "bfloat16")
        weights = pool.pack(dict(model.named_parameters()), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert report.mean_abs_difference < 0.05
        texts = [pool.collect(pool.submit([[7, 8, 9]], max_tokens=8, weights=weights)) for _ in range(2)]
        assert texts[0] == texts[1]
