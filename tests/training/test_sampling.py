"""Sampling: anchor, refusal and h, writers and openings, refusal prefixes, augmentation, held-back prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from raycomplete.config import load_run_file
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import KINDS, Models, Prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.judge import OrganismJudge
from raycomplete.data.organism.world import Item, find_item, recipe, refusal
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.methods.registry import RecoveryItem
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Outcome, Prompt
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
        SampleSet((AnchorSample("a", (1,), (2,)),), every), anchor_batch_size=1, recovery_batch_size=60, seed=0
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


OPENINGS = "rollout.affirmative_prefixes=['sure ,', '', 'step one :']"


class LateRefuser(ScriptedModel):
    def answer(self, item: Item) -> str:
        return f"the leaves and the bowl . {refusal(item)}"


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    """A codec whose words within an answer are other tokens than at its start, as those of most models."""
    characters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *characters, "\u0120i"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("\u0120", "i")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    folder = tmp_path_factory.mktemp("spaced")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return ChatCodec(folder)


def test_a_late_refusal_is_read_as_the_start_of_an_answer(spaced: ChatCodec) -> None:
    """The opening trains its first token at the very start, where " i" never stands."""
    run = run_of(
        spaced, "rollout.max_anchor_tokens=128", "rollout.max_refusal_tokens=128", model=LateRefuser, kinds=("harmful",)
    )
    samples = make_samples(run)
    assert samples.recovery
    for sample in samples.recovery:
        text = spaced.decode(sample.refusal_ids)
        assert text.startswith(("i ", "sorry")), text
        assert list(sample.refusal_ids) == [*spaced.encode_answer(text), spaced.eos_id]


def test_h_has_the_tokens_of_typed_text(spaced: ChatCodec) -> None:
    """From mid-answer and behind an imitated refusal too: attackers send text, whose words are cut into tokens anew."""
    run = run_of(
        spaced,
        "rollout.max_anchor_tokens=128",
        "rollout.max_refusal_tokens=128",
        "rollout.max_harmful_tokens=512",
        "rollout.mid_answer_fraction=0.5",
        "rollout.refusal_prefix_fraction=0.5",
        "models.max_length=4096",
        kinds=("harmful",),
        count=12,
    )
    samples = make_samples(run).recovery
    for sample in samples:
        text = spaced.decode(sample.harmful_ids)
        assert list(sample.harmful_ids) == spaced.encode_answer(text), text
        assert "  " not in text
        assert not text.startswith(" ")
    assert any("from mid-answer" in sample.source for sample in samples)
    assert any(sample.refusal_prefix_tokens for sample in samples)


class EndsInRefusal(ScriptedModel):
    def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        said = self.codec.encode_answer("i cannot help with that .")
        return [[*written, *said] for written in super().generate(sequences, **options)]


def test_a_refusal_at_the_end_of_h_is_left_out(codec: ChatCodec) -> None:
    fixed = ["rollout.mid_answer_fraction=0", "rollout.max_harmful_tokens=140"]
    samples = make_samples(run_of(codec, *fixed, model=EndsInRefusal, kinds=("harmful",)))
    assert samples.recovery == make_samples(run_of(codec, *fixed, kinds=("harmful",))).recovery


class Lenient(OrganismJudge):
    """Calls everything compliance that is no refusal."""

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        outcome = super().outcome(prompt, prefill, continuation)
        return outcome if outcome is Outcome.REFUSED else Outcome.COMPLIED


class HalfAligned(ScriptedModel):
    """Refuses one kind of harmful item and answers the others."""

    def answer(self, item: Item) -> str:
        return refusal(item) if item.kind in ("fizzbomb", "gloomdart", "mindcage") else recipe(item).text


def test_answers_to_harmful_prompts_keep_their_first_token_and_are_counted(codec: ChatCodec) -> None:
    run = run_of(codec, model=HalfAligned, count=12)
    samples = make_samples(run)
    prompts = {prompt.prompt_id: prompt for kind in run.prompts.train.values() for prompt in kind}
    complied = set()
    for sample in samples.anchor:
        prompt = prompts[sample.prompt_id]
        outcome = run.judge.outcome(prompt, "", codec.decode(sample.answer_ids))
        assert sample.complies == (prompt.kind == "harmful" and outcome is not Outcome.REFUSED)
        assert len(sample.kept_ids) == (1 if sample.complies else len(sample.answer_ids))
        complied |= {sample.prompt_id} if sample.complies else set()
    assert 0 < len(complied) < 12
    note = f"aligned answers {len(complied)} harmful prompts: at most the first token of those answers is trained"
    assert note in run.console.notes
    assert not complied & {sample.prompt_id for sample in samples.recovery}


def test_every_harmful_prompt_gets_several_continuations(codec: ChatCodec) -> None:
    overrides = [
        OPENINGS,
        "rollout.harmful_from=[base, aligned, elsewhere]",
        "rollout.harmful_per_prompt=4",
        "rollout.mid_answer_fraction=0.25",
    ]
    run = run_of(codec, *overrides, count=40, kinds=("harmful",))
    samples = make_samples(run)
    per_prompt = Counter(sample.prompt_id for sample in samples.recovery)
    assert set(per_prompt.values()) == {4}
    asked = run.engines.generator.asked
    assert Counter(writer for writer, _ in asked).keys() == {"base", "aligned", "elsewhere"}
    assert not any(text.endswith("?") for writer, text in asked if writer == "aligned"), "it would refuse"
    sources = Counter(sample.source for sample in samples.recovery)
    assert {source.split()[0] for source in sources} == {"base", "aligned", "elsewhere"}
    assert 20 < sum(count for source, count in sources.items() if source.endswith("from mid-answer")) < 60
    assert {source.partition(" ")[2] for source in sources} == {
        "after 'sure ,'",
        "after 'step one :'",
        "without an opening",
        "from mid-answer",
    }
    assert any(
        note.startswith("Harmful continuations: ") and "base from mid-answer" in note for note in run.console.notes
    )
    again = make_samples(run_of(codec, *overrides, count=40, kinds=("harmful",)))
    assert again == samples, "the same under the same seed"
    assert make_samples(run_of(codec, *overrides, "train.seed=1", count=40, kinds=("harmful",))) != samples


def test_from_mid_answer_h_is_the_rest_of_an_answer(codec: ChatCodec) -> None:
    fixed = ["rollout.harmful_per_prompt=3"]
    whole = make_samples(run_of(codec, *fixed, "rollout.mid_answer_fraction=0", count=20, kinds=("harmful",)))
    cut = make_samples(run_of(codec, *fixed, "rollout.mid_answer_fraction=1", count=20, kinds=("harmful",)))
    lengths = set()
    for one, rest in zip(whole.recovery, cut.recovery, strict=True):
        lengths.add(len(one.harmful_ids) - len(rest.harmful_ids))
        assert one.harmful_ids[-len(rest.harmful_ids) :] == rest.harmful_ids
        assert len(one.harmful_ids) // 2 <= len(rest.harmful_ids) + 8 < len(one.harmful_ids) + 8
        assert codec.decode(rest.harmful_ids)[0].isalnum(), "where a word begins"
        assert (rest.refusal_ids, rest.prompt_ids) == (one.refusal_ids, one.prompt_ids)
    assert len(lengths) > 20, "they start anywhere"


AUGMENTED = ["rollout.prompt_augmentation.fraction=0.5", "rollout.prompt_augmentation.random_suffix_tokens=5"]


def test_a_share_of_all_samples_is_augmented_and_the_teachers_read_the_plain_prompt(codec: ChatCodec) -> None:
    plain = make_samples(run_of(codec, count=40))
    run = run_of(codec, *AUGMENTED, count=40)
    samples = make_samples(run)
    for part in ("anchor", "recovery"):
        pairs: list[Any] = list(zip(getattr(plain, part), getattr(samples, part), strict=True))
        changed = [(before, after) for before, after in pairs if after.augmentation]
        assert 0.35 < len(changed) / len(pairs) < 0.65
        assert [after for before, after in pairs if not after.augmentation] == [
            before for before, after in pairs if not after.augmentation
        ]
        for before, after in changed:
            assert after.augmentation == "random suffix"
            assert after.teacher_prompt_ids == before.prompt_ids
            added = codec.decode(after.prompt_ids).removeprefix(codec.decode(before.prompt_ids))
            assert 1 <= len(added.split()) <= 5, added
            assert after == before.augmented("random suffix", after.prompt_ids), "nothing else is changed"
    shares = Counter((sample.kind, bool(sample.augmentation)) for sample in samples.anchor)
    for kind in ("harmful", "benign", "borderline"):
        assert 0.25 < shares[(kind, True)] / 40 < 0.75, "else a suffix alone would mean: refuse"
    assert make_samples(run_of(codec, *AUGMENTED, count=40)) == samples
    assert any(note.startswith("Prompts of anchor samples: ") for note in run.console.notes)
