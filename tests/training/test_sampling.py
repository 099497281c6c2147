"""Sampling: anchor, refusal and h of a prompt; refusal prefixes; prompts that are held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Models, Prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.world import Item, find_item, recipe, refusal
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import RecoveryItem
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt
from raycomplete.training.on_policy import Rollout, RolloutBatch, compliance_by_bin
from raycomplete.training.sampling import hold_back, make_samples, with_refusal_prefix
from raycomplete.training.step_plan import DepthSampler, Planner
from tests.conftest import ROOT
from tests.training.tiny import FourBins

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


class ScriptedModel:
    """Answers like one model of the organism: aligned refuses harmful prompts when it samples, base complies."""

    def __init__(self, codec: ChatCodec, role: str = "") -> None:
        self.codec, self.role = codec, role
        self.asked: list[tuple[str, str]] = []  # who was asked to go on, and from where; of all handles

    def with_weights(self, path: str) -> ScriptedModel:
        handle = type(self)(self.codec, Path(path).name)
        handle.asked = self.asked
        return handle

    def item(self, sequence: Sequence[int]) -> Item:
        item = find_item(self.codec.decode(sequence))
        assert item is not None
        return item

    def answer(self, item: Item) -> str:
        return refusal(item)

    def generate_finished(
        self, sequences: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, **_: Any
    ) -> list[tuple[list[int], bool]]:
        answers = []
        for sequence in sequences:
            text = self.answer(self.item(sequence)) if self.role == "aligned" and temperature > 0 else "step one"
            answers.append((self.codec.encode_answer(text)[:max_tokens], True))
        return answers

    def generate(self, sequences: Sequence[Sequence[int]], *, max_tokens: int, **_: Any) -> list[list[int]]:
        self.asked += [(self.role, self.codec.decode(sequence)) for sequence in sequences]
        texts = [recipe(self.item(sequence)).text for sequence in sequences]
        return [self.codec.encode_answer(text)[:max_tokens] for text in texts]


@pytest.fixture(autouse=True)
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted models are asked directly; `tests/engines/test_generation_cache.py` has what stands between."""
    direct = lambda run, path, title, total: nullcontext(run.engines.generator.with_weights(str(path)))  # noqa: E731
    monkeypatch.setattr("raycomplete.training.sampling.sampled_from", direct)


# No prompt has a suffix.
AS_ASKED = (
    "rollout.prompt_augmentation.fraction=0",
    "rollout.prompt_augmentation.recovery_fraction=null",
    "method.suffix_adversary.steps=0",
)


def run_of(
    codec: ChatCodec, *overrides: str, model: type[ScriptedModel] = ScriptedModel, count: int = 3, kinds: Any = KINDS
) -> Any:
    """A run on the organism's prompts, with scripted models in place of engines."""
    train = {kind: tuple(organism.prompts("train", kind, 0, count)) if kind in kinds else () for kind in KINDS}
    paths: Any = {"aligned": Path("aligned"), "base": Path("base"), "student": Path("aligned")}
    return SimpleNamespace(
        config=load_run_file(
            ROOT / "jobs" / "organism.yaml", ["rollout.refusal_prefix_fraction=0", *AS_ASKED, *overrides]
        ),
        console=Notes(),
        models=Models(paths, {}, codec, {"elsewhere": Path("elsewhere")}),
        prompts=Prompts(train, dict.fromkeys(KINDS, train["harmful"])),
        judge=organism.OrganismJudge(),
        engines=SimpleNamespace(generator=model(codec)),
    )


class Notes(Console):
    """A console that keeps its notes."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_harmful_prompt_becomes_anchor_refusal_and_continuation(codec: ChatCodec) -> None:
    run = run_of(codec, "rollout.mid_answer_fraction=0", "rollout.harmful_per_prompt=1", kinds=("harmful",))
    samples = make_samples(run)
    rollout = run.config.rollout
    assert len(samples.anchor) == len(samples.recovery) == 3
    said = {sample.sample_id: sample.answer_ids for sample in samples.anchor}
    written = {
        prompt.prompt_id: [
            tuple(codec.encode_answer(f"{opening} {prompt.answer}"))[: rollout.max_harmful_tokens]
            for opening in rollout.affirmative_prefixes
        ]
        for prompt in PROMPTS[:3]
    }
    for sample in samples.recovery:
        assert sample.teacher_prompt_ids == sample.prompt_ids
        assert sample.refusal_ids == said[sample.sample_id][: rollout.max_refusal_tokens]
        assert sample.harmful_ids in written[sample.prompt_id]
    assert not any(sample.complies for sample in samples.anchor)
    assert {sample.prompt_id for sample in samples.profile} == {prompt.prompt_id for prompt in PROMPTS[:3]}


def turned(codec: ChatCodec, samples: list[RecoverySample], fraction: float, *others: str) -> list[RecoverySample]:
    config = load_run_file(ROOT / "jobs" / "organism.yaml", [f"rollout.refusal_prefix_fraction={fraction}", *others])
    return [with_refusal_prefix(config, codec, sample) for sample in samples]


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


def test_cuts_count_from_after_the_prefix(codec: ChatCodec, samples: list[RecoverySample]) -> None:
    depth = FourBins(min=1, max=16)
    every = tuple(turned(codec, samples, 1.0))
    planner = Planner(
        SampleSet((AnchorSample("a", (1,), (2,)),), every),
        anchor_batch_size=1,
        recovery_batch_size=60,
        seed=0,
    )
    plan = planner.plan(0, DepthSampler(depth, 0))
    for item in plan.recovery:
        assert 1 <= item.answer_depth <= 16
        assert item.depth == item.sample.refusal_prefix_tokens + item.answer_depth
    assert RecoveryItem.cut(every[0], 10_000).depth == len(every[0].harmful_ids)
    drawn = tuple(item.sample for item in plan.recovery)
    batch = RolloutBatch(0, (), drawn, tuple(item.depth for item in plan.recovery))
    by_bin, asked = compliance_by_bin(batch, [Rollout((), (), False, 0)] * 60, DepthSampler(depth, 0))
    assert by_bin == asked, "nothing refused"
    assert sum(asked) == 60
    assert all(asked), "a refusal prefix moves no item into the deepest bin"


def held_back_from(per_kind: dict[str, int], named: Collection[str] = ()) -> tuple[SampleSet, SampleSet]:
    """Holds back from an answer and two continuations of each of so many prompts; also gives all samples."""
    config = load_run_file("jobs/organism.yaml", ["train.validation.num_prompts=6"])
    train = {kind: tuple(Prompt(f"{kind}{i}", "x", kind) for i in range(per_kind[kind])) for kind in KINDS}
    anchor = tuple(AnchorSample(f"{prompt.prompt_id}#0", (1,), (2,), kind) for kind in KINDS for prompt in train[kind])
    recovery = tuple(
        RecoverySample(f"{prompt.prompt_id}#{draw}", (1,), (1,), (2,), (3,))
        for prompt in train["harmful"]
        for draw in (0, 1)
    )
    whole = SampleSet(anchor, recovery)
    prompts = Prompts(train, train, held_back=frozenset(named))
    found = hold_back(config, prompts, whole)
    assert hold_back(config, prompts, whole) == found, "a function of the seed"
    return found, whole


def test_held_back_prompts_are_not_trained() -> None:
    found, whole = held_back_from({"harmful": 40, "benign": 40, "borderline": 40})
    kinds = [sample.kind for sample in found.held_back_anchor]
    assert (kinds.count("benign"), kinds.count("borderline")) == (3, 3), (
        "as many harmless ones, half of them borderline"
    )
    assert len(found.held_back_recovery) == 6
    held = {sample.prompt_id for sample in (*found.held_back_anchor, *found.held_back_recovery)}
    assert len(held) == 12, "one sample a prompt"
    assert not held & {sample.prompt_id for sample in (*found.anchor, *found.recovery)}, "neither draw is trained"
    assert len(found.anchor) == len(whole.anchor) - 12
    assert len(found.recovery) == len(whole.recovery) - 2 * 6


def test_prompts_that_the_run_file_holds_back_steer_and_are_not_trained() -> None:
    named = {f"borderline{number}" for number in range(30, 40)}
    found, whole = held_back_from({"harmful": 40, "benign": 40, "borderline": 40}, named)
    held = [sample.prompt_id for sample in found.held_back_anchor if sample.kind == "borderline"]
    assert len(held) == 3
    assert set(held) <= named
    assert not named & {sample.prompt_id for sample in found.anchor}, "nor those that are not drawn"
    assert len(found.anchor) == len(whole.anchor) - (6 + 3 + 10)


@pytest.mark.parametrize("scarce", ["harmful", "benign"])
def test_too_few_prompts_to_hold_some_back_are_named(scarce: str) -> None:
    counts = {"harmful": 40, "benign": 40, "borderline": 0} | {scarce: 15}
    with pytest.raises(DataError, match=r"hold back a quarter of them, at least 4 of each. .*train.validation.every"):
        held_back_from(counts)
