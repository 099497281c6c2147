"""Refusal prefixes: which samples get one, what it says, and where h is cut after it."""

from __future__ import annotations

import pytest

from raycomplete.config import DepthConfig, load_run_file
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.world import find_item, refusal
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.runtime.types import Prompt
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.on_policy import compliance_by_bin
from raycomplete.training.refusal_prefix import with_refusal_prefixes
from raycomplete.training.rollout_engines import Rollout, RolloutBatch
from raycomplete.training.sampling import hold_back
from raycomplete.training.step_plan import Planner, RecoveryItem
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
    batch = RolloutBatch(0, (), (), drawn, tuple(item.depth for item in plan.recovery))
    by_bin, asked = compliance_by_bin(batch, [Rollout((), (), False, 0)] * 60, DepthSampler(depth, 0))
    assert by_bin == asked, "nothing refused"
    assert sum(asked) == 60
    assert all(asked), "a refusal prefix moves no item into the deepest bin"


def test_held_back_prompts_are_not_trained() -> None:
    config = load_run_file("jobs/organism.yaml", ["train.validation.every=5", "train.validation.num_prompts=3"])
    train = {kind: tuple(Prompt(f"{kind}{i}", "x", kind) for i in range(20)) for kind in KINDS}
    prompts = Prompts(train, train, organism.OrganismJudge())
    anchor = tuple(
        AnchorSample(f"{prompt.prompt_id}#{draw}", (1,), (2,))
        for kind in KINDS
        for prompt in train[kind]
        for draw in (0, 1)
    )
    recovery = tuple(RecoverySample(f"{prompt.prompt_id}#0", (1,), (1,), (2,), (3,)) for prompt in train["harmful"])
    samples = hold_back(config, prompts, SampleSet(anchor, recovery))
    assert len(samples.held_back_anchor) == 3 * len(KINDS) * 2
    assert len(samples.held_back_recovery) == 3
    assert {*samples.anchor, *samples.held_back_anchor} == {*anchor}
    names = [{sample.sample_id.split("#")[0] for sample in part} for part in (samples.anchor, samples.held_back_anchor)]
    assert not names[0] & names[1], "all draws of a prompt go the same way"
    assert not {sample.sample_id for sample in samples.recovery} & {s.sample_id for s in samples.held_back_recovery}
    again = hold_back(config, prompts, SampleSet(anchor, recovery))
    assert again == samples
