"""Refusal prefixes: which samples get one, what it says, and where h is cut after it."""

from __future__ import annotations

from typing import Any

import pytest

from raycomplete.config import DepthConfig, load_run_file
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.world import find_item, refusal
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.runtime.types import Outcome
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.on_policy import Rollout, RolloutBatch, RolloutRequest, compliance_by_bin
from raycomplete.training.refusal_prefix import with_refusal_prefixes
from raycomplete.training.step_plan import Planner, RecoveryItem
from raycomplete.training.student_engines import StudentEngines
from tests.conftest import ROOT

PROMPTS = organism.prompts("train", "harmful", 0, 60)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def samples(codec: ChatCodec) -> list[RecoverySample]:
    found = []
    for prompt in PROMPTS:
        item = find_item(prompt.text)
        assert item is not None
        ids, h = codec.encode_prompt(prompt.text), codec.encode_answer(prompt.answer or "")
        said = (*codec.encode_answer(refusal(item)), codec.eos_id)
        found.append(RecoverySample(f"{prompt.prompt_id}#0", tuple(ids), tuple(ids), tuple(h), said))
    return found


def turned(codec: ChatCodec, samples: list[RecoverySample], fraction: float, *others: str) -> list[RecoverySample]:
    config = load_run_file(ROOT / "jobs" / "organism.yaml", [f"rollout.refusal_prefix_fraction={fraction}", *others])
    return with_refusal_prefixes(config, codec, samples)


def test_a_share_of_the_samples_turns(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    assert turned(codec, samples, 0.0) == samples
    some = turned(codec, samples, 0.5)
    assert 15 < sum(sample.refusal_prefix_tokens > 0 for sample in some) < 45
    assert turned(codec, samples, 0.5) == some
    assert turned(codec, samples, 0.5, "train.seed=1") != some
    # A larger share keeps the turns of a smaller one.
    assert all(
        one in (kept, plain) for one, kept, plain in zip(some, turned(codec, samples, 1.0), samples, strict=True)
    )


def test_the_prefix_is_a_refusal_and_a_turn_and_the_rest_stays(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    turns = set()
    for plain, sample in zip(samples, turned(codec, samples, 1.0), strict=True):
        said = codec.decode(sample.harmful_ids[: sample.refusal_prefix_tokens])
        sentence, turn = said.split(" . ", 1)
        assert codec.decode(plain.refusal_ids).startswith(f"{sentence} .")
        turns.add(turn)
        assert sample.harmful_ids[sample.refusal_prefix_tokens :] == plain.harmful_ids
        assert (sample.prompt_ids, sample.teacher_prompt_ids, sample.refusal_ids, sample.sample_id) == (
            plain.prompt_ids,
            plain.teacher_prompt_ids,
            plain.refusal_ids,
            plain.sample_id,
        )
    assert turns == {"sure ,", "please", "at last ,", "and"}


def test_a_prefix_that_is_too_long_is_left_out(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    assert turned(codec, samples, 1.0, f'rollout.refusal_prefix_turns=["{"and " * 60}"]') == samples


def test_cuts_count_from_after_the_prefix(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    depth = DepthConfig(min=1, max=16, bins=4)
    every = tuple(turned(codec, samples, 1.0))
    planner = Planner(
        SampleSet((AnchorSample("a", (1,), (2,)),), every), anchor_batch=1, recovery_batch=60, seed=0, max_depth=16
    )
    plan = planner.plan(0, DepthSampler(depth, 0))
    for item in plan.recovery:
        assert 1 <= item.answer_depth <= 16
        assert item.depth == item.sample.refusal_prefix_tokens + item.answer_depth
    assert RecoveryItem.cut(every[0], 10_000).depth == len(every[0].harmful_ids)
    drawn = tuple(item.sample for item in plan.recovery)
    draft = RolloutBatch(0, (), (), drawn, tuple(item.depth for item in plan.recovery))
    by_bin, asked = compliance_by_bin(draft, [Rollout((), (), False, 0)] * 60, DepthSampler(depth, 0))
    assert by_bin == asked, "nothing refused"
    assert sum(asked) == 60
    assert all(asked), "a refusal prefix moves no item into the deepest bin"
    assert {request.refusal_prefix_tokens for request in draft.requests()} == {
        sample.refusal_prefix_tokens for sample in every
    }


def test_the_judge_does_not_read_the_imitated_refusal(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    read: list[tuple[str, str]] = []

    class Recorder:
        name = "recorder"

        def outcome(self, prompt: Any, prefill: str, continuation: str) -> Outcome:
            read.append((prefill, continuation))
            return Outcome.COMPLIED

    class Pool:
        def collect(self, call: Any) -> list[tuple[list[int], bool]]:
            return [(codec.encode_answer("step one"), True)]

    class Call:
        version = 3

    (sample,) = turned(codec, samples[:1], 1.0)
    config = load_run_file(ROOT / "jobs" / "organism.yaml")
    engines = StudentEngines(Pool(), codec, Recorder(), PROMPTS, config.rollout)  # type: ignore[arg-type]
    cut = RecoveryItem.cut(sample, 4)
    request = RolloutRequest(
        sample.sample_id, sample.prompt_ids, sample.harmful_ids[: cut.depth], True, sample.refusal_prefix_tokens
    )
    (rollout,) = engines.collect(([request], Call(), None))
    assert not rollout.refused
    assert read == [(codec.decode(codec.encode_answer(PROMPTS[0].answer or "")[:4]), "step one")]
