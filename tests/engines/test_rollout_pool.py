"""The pool: order and seeds whatever the number of engines, replaced engines, limits that say what was needed."""

from __future__ import annotations

import os
import pickle
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.engines import rollout_pool as pool_module
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import EngineAnswer, Sampling
from raycomplete.engines.weights import Weights, pack, version_of
from raycomplete.runtime.errors import WaitTimeoutError, WorkError
from tests.engines.tiny import log_probs_of, options, random_probe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Echo:
    """Stands for an actor's handle, without a process: a response is the sequence and the seed it would sample under.

    Args:
        version: Of the weights that it pretends to hold; those that are named when absent.
        reference: What every call returns instead.
    """

    def __init__(self, version: int | None = None, reference: Any = None) -> None:
        self._version = version
        self._reference = reference
        self.generate = SimpleNamespace(remote=self._generate)
        self.log_probs = SimpleNamespace(remote=self._log_probs)

    def _generate(self, weights: Any, sequences: list[list[int]], sampling: Sampling) -> Any:
        assert sampling.seed is not None
        responses = [([*sequence, sampling.seed + index], True) for index, sequence in enumerate(sequences)]
        answer = EngineAnswer(responses, self._version or version_of(weights), "first", 1.0, 0.0)
        return self._reference or ray.put(answer)

    def _log_probs(self, weights: Any, probe: Any) -> Any:
        return self._reference or ray.put(None)


@pytest.fixture(scope="module")
def pair(generator: RolloutPool, spare: Any) -> RolloutPool:
    """The shared engine and one that may be killed."""
    base = str(checkpoint_path("base"))
    ray.get(spare.become.remote(generator.options, False), timeout=120)
    pool = RolloutPool([*generator._actors, spare], base, generator.options)
    assert pool.wait_until_ready(timeout_s=300)["num_engines"] == 2
    return pool


@pytest.fixture(scope="module")
def aligned() -> Weights:
    model = load_model(checkpoint_path("aligned"), "float32")
    return pack(dict(model.named_parameters()), 4, str(checkpoint_path("base")))


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    codec = ChatCodec(checkpoint_path("aligned"))
    return [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 13)]


SAMPLED: dict[str, Any] = {"max_tokens": 40, "temperature": 1.3, "top_p": 0.95, "top_k": 60, "seed": 17}


@given(count=st.integers(0, 40), engines=st.integers(1, 3), slice_size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_each_sequence_keeps_its_place_and_its_seed(count: int, engines: int, slice_size: int, seed: int) -> None:
    pool = RolloutPool([Echo() for _ in range(engines)], "/nowhere", options())
    before, pool_module._SLICE = pool_module._SLICE, slice_size
    try:
        call = pool.submit([[100 + index] for index in range(count)], max_tokens=4, seed=seed)
    finally:
        pool_module._SLICE = before
    assert pool.collect(call) == [([100 + index, seed + index], True) for index in range(count)]
    shares = [sum(size for engine, size, _ in call.shards if engine == index) for index in range(engines)]
    assert max(shares) - min(shares) <= 1


def test_one_and_two_engines_sample_the_same(
    generator: RolloutPool, pair: RolloutPool, aligned: Weights, sequences: list[list[int]]
) -> None:
    alone = generator.collect(generator.submit(sequences, weights=aligned, **SAMPLED))
    assert pair.collect(pair.submit(sequences, weights=aligned, **SAMPLED)) == alone
    assert len({tuple(tokens) for tokens, _ in alone}) > 1
    assert generator.with_weights(str(checkpoint_path("aligned"))).generate_finished(sequences, **SAMPLED) == alone


def test_a_killed_engine_is_replaced_and_repeats_its_part(
    pair: RolloutPool, aligned: Weights, sequences: list[list[int]]
) -> None:
    """The replacement starts from base again, so it must fetch the named version before it answers."""
    undisturbed = pair.collect(pair.submit(sequences, weights=aligned, **SAMPLED))
    victim = pair._actors[1]
    process = ray.get(victim.__ray_call__.remote(lambda worker: os.getpid()), timeout=60)
    handle = pickle.loads(pickle.dumps(pair))  # as a training worker holds it
    call = handle.submit(sequences, weights=aligned, **SAMPLED)
    os.kill(process, signal.SIGKILL)
    assert handle.collect(call) == undisturbed
    stats = handle.stats()
    assert (stats["restarts"], stats["loads"]) == (1, 1)
    assert stats["tokens"] == sum(len(tokens) for tokens, _ in undisturbed)
    assert stats["tokens_per_s"] == pytest.approx(stats["tokens"] / stats["seconds"])


def test_an_engine_that_rests_holds_no_memory_and_answers_the_same_afterwards(
    pair: RolloutPool, aligned: Weights, sequences: list[list[int]]
) -> None:
    pool = RolloutPool(pair._actors[1:], str(checkpoint_path("base")), pair.options)
    before = pool.collect(pool.submit(sequences, weights=aligned, **SAMPLED))
    actor = pool._actors[0]
    process = ray.get(actor.__ray_call__.remote(lambda worker: os.getpid()), timeout=60)
    pool.rest()
    state, deadline = (process, None), time.monotonic() + 60
    while state[0] == process and time.monotonic() < deadline:  # the old process ends a moment later
        state = ray.get(actor.__ray_call__.remote(lambda worker: (os.getpid(), worker._engine)), timeout=60)
    assert state[0] != process
    assert state[1] is None
    assert pool.collect(pool.submit(sequences, weights=aligned, **SAMPLED)) == before
    assert pool.stats()["restarts"] == 0, "it did not die"


def test_log_probs_of_given_answers_are_those_of_the_named_model(generator: RolloutPool, pair: RolloutPool) -> None:
    """Both checkpoints go through the same engine, so the answers of one must not come from the other."""
    probe = random_probe(3, count=5)
    for role in ("aligned", "base"):
        path = checkpoint_path(role)
        expected = log_probs_of(load_model(path, "float32"), probe)
        for pool in (generator, pair):
            found = pool.with_weights(str(path)).log_probs(probe)
            for row, expected_T in zip(found, expected, strict=True):
                assert row == pytest.approx(expected_T.tolist(), abs=1e-4)


def test_an_answer_of_another_version_is_refused(aligned: Weights) -> None:
    pool = RolloutPool([Echo(version=3)], "/nowhere", options())
    with pytest.raises(WorkError, match=r"weights of version 3, and version 4 was asked for"):
        pool.collect(pool.submit([[1]], max_tokens=1, seed=0, weights=aligned))


def test_a_wait_that_ends_says_who_was_late_and_what_stood_before(
    aligned: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycomplete.engines.rollout_pool.ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr("raycomplete.engines.rollout_pool.SYNC_TIMEOUT_S", 1.0)
    never = ray.remote(lambda: time.sleep(60)).options(num_cpus=0).remote()
    pool = RolloutPool([Echo(), Echo(reference=never)], "/nowhere", options())
    call = pool.submit([[1], [2]], max_tokens=1, seed=0)
    with pytest.raises(WaitTimeoutError, match=r"rollout engine 2 of 2 did not deliver 1 responses within 0 s"):
        pool.collect(call)
    probe = random_probe(0)
    model = load_model(checkpoint_path("base"), "float32")
    message = r"After 1 s these have not answered with the weights of version 4: rollout engine 2 of 2\. "
    with pytest.raises(WaitTimeoutError, match=message):
        pool.sync(aligned, probe, log_probs_of(model, probe))
    ray.cancel(never, force=True)
